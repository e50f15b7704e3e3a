// A canvas that is sharp on every screen, painted at most once a frame, and again when its size or the colour scheme changes.

export class Picture {
  #canvas;
  #paint;
  #frame = 0;
  #ratio = 1;

  /** `paint(context, width, height, colour)` in CSS pixels; `colour(name)` is the custom property's value. */
  constructor(canvas, paint) {
    this.#canvas = canvas;
    this.#paint = paint;
    new ResizeObserver(() => this.#resize()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** In a tab that is not seen no frame comes: the picture waits until it is. */
  draw() {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      const { width, height } = this.#canvas;
      if (width === 0 || height === 0) return;
      const context = this.#canvas.getContext("2d");
      const style = getComputedStyle(this.#canvas);
      context.setTransform(this.#ratio, 0, 0, this.#ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      this.#paint(context, width / this.#ratio, height / this.#ratio, (name) => style.getPropertyValue(`--${name}`).trim());
    });
  }

  #resize() {
    const { clientWidth, clientHeight } = this.#canvas;
    this.#ratio = globalThis.devicePixelRatio || 1;
    this.#canvas.width = Math.round(clientWidth * this.#ratio);
    this.#canvas.height = Math.round(clientHeight * this.#ratio);
    this.draw();
  }
}

/** The page's typeface at a size, for text in a picture. */
export function font(size, weight = 400) {
  return `${weight} ${size}px ${getComputedStyle(document.documentElement).fontFamily}`;
}

// The wheels: for every expert a circle, on it a dot for each rotation that the gate asked for, at its angle. Straight up is no
// rotation. Each language has a ring, a colour and a shape of its own.

import { choices, numbered } from "./choices.js";
import { languageName, markOf, shapeOf } from "./languages.js";
import { font, Picture } from "./picture.js";
import { fill } from "./table.js";

const CAPTIONS = {
  plane:
    "Each dot is a byte of unseen text, placed by how far its chosen expert is turned for it: straight up is not at all. Languages have a ring each.",
  turn:
    "Each dot is a byte of unseen text, placed by the angle between an expert’s output before and after the rotation: straight up is none. Languages have a ring each.",
};
const ABSENT = "Only RotMoLE turns its experts: train it to see by how much.";
/** The innermost and the outermost ring, of the circle's radius. */
const INNER = 0.34;
const OUTER = 0.98;
/** More dots than these on one wheel only hide each other. */
const MOST_DOTS = 1600;

export class Wheels {
  #parts;
  #languages;
  #picture;
  /** What `show` was called with last. */
  #shown = [];
  #inspection = null;
  #experts = 4;
  #only = null;

  /** `parts`: canvas, caption, layer, plane, languages, table. */
  constructor(parts, languages) {
    this.#parts = parts;
    this.#languages = languages;
    this.#picture = new Picture(parts.canvas, (...picture) => this.#paint(...picture));
    for (const select of [parts.layer, parts.plane]) select.addEventListener("change", () => this.#draw());
    parts.languages.replaceChildren(...languages.map((code, language) => this.#button(code, language)));
    this.show(null, { experts: 4, kinds: ["rotmole"], rotation: "planes" });
  }

  /** `inspection` of RotMoLE or null; `settings` say how many wheels there are before there is one. */
  show(inspection, settings) {
    const shown = [inspection, settings.experts, settings.rotation, settings.kinds.includes("rotmole")];
    if (shown.every((part, index) => part === this.#shown[index])) return;
    this.#shown = shown;
    const { caption, layer, plane, canvas } = this.#parts;
    this.#inspection = inspection?.angle_count ? inspection : null;
    this.#experts = settings.experts;
    canvas.style.aspectRatio = `${this.#columns()} / ${Math.ceil(this.#experts / this.#columns())}`;
    const kind = inspection?.angle_kind ?? (["cayley", "householder"].includes(settings.rotation) ? "turn" : "plane");
    caption.textContent = settings.kinds.includes("rotmole") ? CAPTIONS[kind] : ABSENT;
    choices(layer, numbered(inspection?.layers ?? 2));
    const planes = this.#inspection?.angle_count ?? 1;
    choices(plane, planes > 1 ? [{ value: "all", text: "all" }, ...numbered(planes)] : [{ value: "all", text: "all" }]);
    this.#draw();
  }

  #columns() {
    const experts = this.#experts;
    return experts <= 1 ? 1 : experts <= 4 ? 2 : experts <= 9 ? 3 : 4;
  }

  #button(code, language) {
    const button = document.createElement("button");
    button.type = "button";
    button.title = `Only ${languageName(code)}`;
    button.setAttribute("aria-label", `${code}, ${languageName(code)}`);
    button.setAttribute("aria-pressed", "false");
    button.append(markOf(language), code);
    button.addEventListener("click", () => {
      this.#only = this.#only === language ? null : language;
      [...this.#parts.languages.children].forEach((other, index) => other.setAttribute("aria-pressed", String(index === this.#only)));
      this.#draw();
    });
    return button;
  }

  #draw() {
    this.#picture.draw();
    this.#describe();
  }

  /** Calls `visit(expert, language, angle)` for every dot of the chosen layer and plane. */
  #visit(visit) {
    const inspection = this.#inspection;
    if (!inspection) return;
    const layer = Number(this.#parts.layer.value);
    const plane = this.#parts.plane.value;
    const { angles, angle_count: count } = inspection;
    inspection.angle_expert.forEach((expert, entry) => {
      if (inspection.angle_layer[entry] !== layer) return;
      const first = entry * count;
      const [from, to] = plane === "all" ? [0, count] : [Number(plane), Number(plane) + 1];
      for (let index = from; index < to; index++) visit(expert, inspection.angle_language[entry], angles[first + index]);
    });
  }

  #describe() {
    const { canvas, table } = this.#parts;
    // By expert and language: the sums of the angles' sines and cosines, whose direction is the mean angle.
    const sums = Array.from({ length: this.#experts }, () => this.#languages.map(() => [0, 0, 0]));
    this.#visit((expert, language, angle) => {
      const sum = sums[expert][language];
      sum[0] += Math.sin(angle);
      sum[1] += Math.cos(angle);
      sum[2] += 1;
    });
    const degrees = ([sine, cosine, count]) => (count ? `${Math.round((Math.atan2(sine, cosine) * 180) / Math.PI)}°` : "–");
    fill(
      table,
      ["Mean angle", ...sums.map((_, expert) => `Expert ${expert + 1}`)],
      this.#languages.map((code, language) => ({ head: languageName(code), cells: sums.map((expert) => degrees(expert[language])) })),
    );
    const used = sums.filter((expert) => expert.some(([, , count]) => count)).length;
    canvas.setAttribute(
      "aria-label",
      this.#inspection
        ? `Rotation angles of layer ${Number(this.#parts.layer.value) + 1}: a wheel for each of ${this.#experts} experts, ${used} of them in use. The mean angles are in the table below.`
        : "Rotation angles: nothing trained yet.",
    );
  }

  #paint(context, width, height, colour) {
    const columns = this.#columns();
    const cell = width / columns;
    const radius = cell / 2 - 12;
    const centre = (expert) => [(expert % columns) * cell + cell / 2, Math.floor(expert / columns) * cell + cell / 2];
    const ring = (language) => radius * (INNER + ((OUTER - INNER) * (language + 0.5)) / this.#languages.length);
    for (let expert = 0; expert < this.#experts; expert++) this.#wheel(context, colour, centre(expert), radius, ring, expert);

    const total = new Array(this.#experts).fill(0);
    this.#visit((expert) => total[expert]++);
    const every = total.map((count) => Math.max(1, Math.ceil(count / MOST_DOTS)));
    const seen = new Array(this.#experts).fill(0);
    const size = Math.max(1.1, radius / 62);
    const shapes = this.#languages.map((_, language) => shapeOf(language, size));
    const colours = this.#languages.map((_, language) => colour(`language-${language % 8}`));
    // A little to and fro across the ring, the same at every painting, so that equal angles do not hide each other.
    const band = ((OUTER - INNER) * radius) / this.#languages.length;
    this.#visit((expert, language, angle) => {
      const number = seen[expert]++;
      if (number % every[expert] !== 0) return;
      if (this.#only !== null && this.#only !== language) return;
      const [x, y] = centre(expert);
      const along = ring(language) + (((number * 0.618) % 1) - 0.5) * band * 0.7;
      context.save();
      context.translate(x + along * Math.sin(angle), y - along * Math.cos(angle));
      context.globalAlpha = 0.75;
      context.fillStyle = colours[language];
      context.fill(shapes[language]);
      context.restore();
    });
  }

  #wheel(context, colour, [x, y], radius, ring, expert) {
    context.lineWidth = 1;
    context.strokeStyle = colour("grid");
    this.#languages.forEach((_, language) => {
      context.beginPath();
      context.arc(x, y, ring(language), 0, 2 * Math.PI);
      context.stroke();
    });
    context.strokeStyle = colour("field-line");
    for (let quarter = 0; quarter < 4; quarter++) {
      const [sine, cosine] = [Math.sin((quarter * Math.PI) / 2), Math.cos((quarter * Math.PI) / 2)];
      context.beginPath();
      context.moveTo(x + sine * radius, y - cosine * radius);
      context.lineTo(x + sine * (radius + (quarter ? 3 : 7)), y - cosine * (radius + (quarter ? 3 : 7)));
      context.stroke();
    }
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.fillStyle = colour("ink");
    context.font = font(radius > 60 ? 15 : 12, 600);
    context.fillText(expert + 1, x, radius > 60 ? y + 5 : y);
    if (radius > 60) {
      context.fillStyle = colour("quiet");
      context.font = font(10.5);
      context.fillText("expert", x, y - 9);
    }
  }
}

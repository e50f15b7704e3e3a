// How a language is told apart in every picture: by name, by colour, by shape, and by its place.

const names = new Intl.DisplayNames(["en"], { type: "language" });

export function languageName(code) {
  return names.of(code) ?? code;
}

/** Eight shapes of about the same weight, each a path around (0, 0) for a radius. */
const SHAPES = [
  (path, r) => path.arc(0, 0, r, 0, 2 * Math.PI),
  (path, r) => polygon(path, [[-r, -r], [r, -r], [r, r], [-r, r]].map(([x, y]) => [x * 0.88, y * 0.88])),
  (path, r) => polygon(path, [[0, -1.25 * r], [1.25 * r, 0], [0, 1.25 * r], [-1.25 * r, 0]]),
  (path, r) => polygon(path, [[0, -1.2 * r], [1.15 * r, 0.9 * r], [-1.15 * r, 0.9 * r]]),
  (path, r) => polygon(path, [[0, 1.2 * r], [1.15 * r, -0.9 * r], [-1.15 * r, -0.9 * r]]),
  (path, r) => polygon(path, cross(r, 0)),
  (path, r) => polygon(path, cross(r, Math.PI / 4)),
  (path, r) => polygon(path, Array.from({ length: 10 }, (_, i) => polar(i % 2 ? 0.55 * r : 1.35 * r, (i * Math.PI) / 5))),
];

const polar = (radius, angle) => [radius * Math.sin(angle), -radius * Math.cos(angle)];

function cross(r, turn) {
  const w = 0.42 * r;
  const l = 1.25 * r;
  const points = [[-w, -l], [w, -l], [w, -w], [l, -w], [l, w], [w, w], [w, l], [-w, l], [-w, w], [-l, w], [-l, -w], [-w, -w]];
  return points.map(([x, y]) => [x * Math.cos(turn) - y * Math.sin(turn), x * Math.sin(turn) + y * Math.cos(turn)]);
}

function polygon(path, points) {
  points.forEach(([x, y], index) => (index ? path.lineTo(x, y) : path.moveTo(x, y)));
  path.closePath();
}

/** The shape of a language, as a path to fill. */
export function shapeOf(language, radius) {
  const path = new Path2D();
  SHAPES[language % SHAPES.length](path, radius);
  return path;
}

/** The same shape as a small picture beside the language's name. */
export function markOf(language) {
  const commands = [];
  const recorder = {
    moveTo: (x, y) => commands.push(`M${x.toFixed(2)} ${y.toFixed(2)}`),
    lineTo: (x, y) => commands.push(`L${x.toFixed(2)} ${y.toFixed(2)}`),
    closePath: () => commands.push("Z"),
    arc: (_x, _y, r) => commands.push(`M${-r} 0A${r} ${r} 0 1 1 ${r} 0A${r} ${r} 0 1 1 ${-r} 0Z`),
  };
  SHAPES[language % SHAPES.length](recorder, 4);
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "-6 -6 12 12");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(space, "path");
  path.setAttribute("d", commands.join(""));
  path.style.fill = `var(--language-${language % SHAPES.length})`;
  svg.append(path);
  return svg;
}

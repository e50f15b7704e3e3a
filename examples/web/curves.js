// The loss curves: the base to the left of the line where it is frozen, the adapters to the right of it.

import { ADAPTERS, LABELS } from "./kinds.js";
import { font, Picture } from "./picture.js";
import { fill } from "./table.js";

const DASHES = { base: [2, 3], lora: [], moe_lora: [6, 5], rotmole: [] };
const WIDTHS = { base: 2, lora: 1.5, moe_lora: 2.5, rotmole: 4.5 };
const LEFT = 34;
const WIDE = 480;
const TOP = 26;
const BOTTOM = 38;
/** Rows of the table: so many moments of the training. */
const MOMENTS = 8;

/** The mean of the last `span` losses at every step. */
export function smooth(losses, span) {
  let sum = 0;
  return losses.map((loss, step) => {
    sum += loss;
    if (step >= span) sum -= losses[step - span];
    return sum / Math.min(step + 1, span);
  });
}

export class Curves {
  #canvas;
  #table;
  #picture;
  #experiment = null;

  constructor(canvas, table) {
    this.#canvas = canvas;
    this.#table = table;
    this.#picture = new Picture(canvas, (...picture) => this.#paint(...picture));
    this.#describe([]);
  }

  show(experiment) {
    this.#experiment = experiment;
    this.#picture.draw();
    this.#describe(this.#curves());
  }

  #curves() {
    const experiment = this.#experiment;
    if (!experiment) return [];
    return [experiment.base, ...experiment.adapters]
      .filter((run) => run?.losses.length)
      .map((run) => ({
        kind: run.kind,
        first: run.kind === "base" ? -experiment.settings.baseSteps : 0,
        losses: run.losses,
        smoothed: smooth(run.losses, Math.max(1, Math.round(run.steps / 25))),
      }));
  }

  #describe(curves) {
    const now = curves.map(({ kind, smoothed }) => `${LABELS[kind]} ${smoothed.at(-1).toFixed(2)}`);
    this.#canvas.setAttribute("aria-label", `Loss curves, bits per byte. ${now.length ? `Now: ${now.join(", ")}.` : "Nothing trained yet."}`);
    const adapters = curves.filter(({ kind }) => kind !== "base");
    const steps = this.#experiment?.settings.steps ?? 0;
    const moments = Array.from({ length: MOMENTS }, (_, index) => Math.max(1, Math.round((steps * (index + 1)) / MOMENTS)));
    const head = this.#experiment?.settings.kinds ?? ADAPTERS;
    fill(this.#table, ["Step", ...head.map((kind) => LABELS[kind])], moments.map((step, index) => ({
      head: steps ? String(step) : `${index + 1} of ${MOMENTS}`,
      cells: head.map((kind) => adapters.find((curve) => curve.kind === kind)?.smoothed[step - 1]?.toFixed(2) ?? "–"),
    })));
  }

  #paint(context, width, height, colour) {
    const curves = this.#curves();
    const { baseSteps, steps } = this.#experiment?.settings ?? { baseSteps: 20, steps: 200 };
    // A narrow picture has no room for the numbers beside the names.
    const right = width - (width > WIDE ? 112 : 72);
    let [low, high] = [4, 8];
    for (const { losses } of curves) {
      for (const loss of losses) {
        low = Math.min(low, Math.floor(loss));
        high = Math.max(high, Math.ceil(loss));
      }
    }
    const x = (step) => LEFT + ((step + baseSteps) / (baseSteps + steps)) * (right - LEFT);
    const y = (loss) => TOP + ((high - loss) / (high - low)) * (height - TOP - BOTTOM);
    this.#axes(context, width, height, colour, { x, y, low, high, baseSteps, steps, right });

    const labels = [];
    context.lineJoin = "round";
    // Thick lines lie under thin ones: where all go the same way each is still seen.
    for (const { kind, first, losses, smoothed } of curves.toSorted((one, other) => WIDTHS[other.kind] - WIDTHS[one.kind])) {
      const line = (values, width, dash, alpha) => {
        context.lineWidth = width;
        context.globalAlpha = alpha;
        context.setLineDash(dash);
        context.beginPath();
        values.forEach((loss, step) => context.lineTo(x(first + step + 1), y(loss)));
        context.stroke();
      };
      context.strokeStyle = context.fillStyle = colour(`run-${kind}`);
      line(losses, 1, [], 0.28);
      line(smoothed, WIDTHS[kind], DASHES[kind], 1);
      context.setLineDash([]);
      const end = { kind, x: x(first + smoothed.length), y: y(smoothed.at(-1)), loss: smoothed.at(-1) };
      mark(context, end);
      // The base has its label only while nothing else has.
      if (kind !== "base" || curves.length === 1) labels.push(end);
    }
    this.#write(context, labels, colour, y(low), width > WIDE);
  }

  #axes(context, width, height, colour, { x, y, low, high, baseSteps, steps, right }) {
    context.font = font(12);
    context.lineWidth = 1;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let loss = low; loss <= high; loss++) {
      context.strokeStyle = colour("grid");
      context.beginPath();
      context.moveTo(LEFT, y(loss));
      context.lineTo(right, y(loss));
      context.stroke();
      context.fillStyle = colour("quiet");
      context.fillText(loss, LEFT - 10, y(loss));
    }
    context.strokeStyle = colour("field-line");
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(x(0), TOP - 8);
    context.lineTo(x(0), y(low));
    context.stroke();
    context.setLineDash([]);

    context.textBaseline = "alphabetic";
    context.textAlign = "left";
    context.fillText("bits per byte", 0, 11);
    context.textAlign = "left";
    context.fillText(width > WIDE ? "base frozen; adapters learn eight languages" : "eight languages", Math.max(x(0) + 8, 90), 11);
    context.textAlign = "center";
    context.fillText(`${baseSteps} steps`, x(-baseSteps / 2), height - 20);
    const tick = niceStep(steps, width > WIDE ? 5 : 3);
    for (let step = 0; step <= steps; step += tick) {
      if (step === 0 && x(0) - x(-baseSteps / 2) < 40) continue;
      context.fillText(step, x(step), height - 20);
    }
    context.fillText("training steps", (x(0) + x(steps)) / 2, height - 4);
  }

  /** Labels beside the ends of the lines, moved apart where they would lie on each other. */
  #write(context, labels, colour, bottom, numbers) {
    context.textAlign = "left";
    context.textBaseline = "middle";
    labels.sort((one, other) => one.y - other.y);
    const gap = 17;
    labels.forEach((label, index) => {
      if (index > 0) label.y = Math.max(label.y, labels[index - 1].y + gap);
    });
    labels.reduceRight((limit, label) => {
      label.y = Math.min(label.y, limit);
      return label.y - gap;
    }, bottom);
    for (const { kind, x, y, loss } of labels) {
      context.fillStyle = colour(`run-${kind}`);
      context.font = font(12.5, 600);
      context.fillText(LABELS[kind], x + 10, y);
      if (!numbers) continue;
      const width = context.measureText(LABELS[kind]).width;
      context.fillStyle = colour("ink");
      context.font = font(12.5);
      context.fillText(loss.toFixed(2), x + 15 + width, y);
    }
  }
}

/** The end of a line, in a shape of its own. */
function mark(context, { kind, x, y }) {
  context.beginPath();
  if (kind === "moe_lora") context.rect(x - 4, y - 4, 8, 8);
  else if (kind === "rotmole") {
    context.moveTo(x, y - 6);
    context.lineTo(x + 5.5, y + 4);
    context.lineTo(x - 5.5, y + 4);
  } else context.arc(x, y, 4, 0, 2 * Math.PI);
  context.fill();
}

/** A round number so that about `count` of them make `whole`. */
function niceStep(whole, count) {
  const rough = whole / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  return Math.max(1, [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough));
}

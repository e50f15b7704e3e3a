// What is best shown as a table: which expert serves which language, held-out text, and the runs.

import { choices, numbered } from "./choices.js";
import { ADAPTERS, LABELS } from "./kinds.js";
import { languageName } from "./languages.js";
import { fill } from "./table.js";

const NONE = "–";

/** Layer by layer, the share that each expert has of each language: a table whose squares are coloured. */
export class ExpertMap {
  #table;
  #layer;
  #languages;
  /** What `show` was called with last. */
  #shown;
  #inspection = null;
  #experts = 4;

  constructor(table, layer, languages) {
    this.#table = table;
    this.#layer = layer;
    this.#languages = languages;
    layer.addEventListener("change", () => this.#draw());
    this.show(null, { experts: 4 });
  }

  show(inspection, { experts }) {
    if (inspection === this.#shown && experts === this.#experts) return;
    this.#shown = inspection;
    this.#inspection = inspection?.experts ? inspection : null;
    this.#experts = experts;
    choices(this.#layer, numbered(inspection?.layers ?? 2));
    this.#draw();
  }

  #draw() {
    const layer = Number(this.#layer.value);
    const share = (expert, language) => this.#inspection.shares[(layer * this.#experts + expert) * this.#languages.length + language];
    fill(
      this.#table,
      ["Expert", ...Array.from({ length: this.#experts }, (_, expert) => String(expert + 1))],
      this.#languages.map((code, language) => ({
        head: languageName(code),
        cells: Array.from({ length: this.#experts }, (_, expert) => {
          if (!this.#inspection) return { text: NONE, share: 0 };
          const part = share(expert, language);
          return { text: `${Math.round(100 * part)} %`, share: part };
        }),
      })),
    );
  }
}

/** Held-out bits per byte of the base and of every adapter, by language: the languages across, or down where the page is narrow. */
export class HeldOut {
  #table;
  #languages;
  #experiment = null;
  #wide = matchMedia("(min-width: 56rem)");

  constructor(table, languages) {
    this.#table = table;
    this.#languages = languages;
    this.#wide.addEventListener("change", () => this.show(this.#experiment));
  }

  show(experiment) {
    this.#experiment = experiment;
    const runs = runsOf(experiment);
    const languages = [...this.#languages.map(languageName), "Mean"];
    const bits = runs.map(({ run }) => withMean(run?.inspection?.bits ?? this.#languages.map(() => NaN)));
    const compared = bits.filter(([first]) => Number.isFinite(first)).length > 1;
    const best = languages.map((_, language) => Math.min(...bits.map((of) => of[language]).filter(Number.isFinite)));
    const cell = (run, language) => {
      const number = bits[run][language];
      const classes = [compared && number === best[language] ? "best" : "", language === languages.length - 1 ? "mean" : ""];
      return { text: Number.isFinite(number) ? number.toFixed(2) : NONE, className: classes.join(" ").trim() };
    };
    const names = runs.map(({ kind }) => LABELS[kind]);
    if (this.#wide.matches) {
      fill(this.#table, ["Bits per byte", ...languages], names.map((head, run) => ({ head, cells: languages.map((_, language) => cell(run, language)) })));
    } else {
      fill(this.#table, ["Language", ...names], languages.map((head, language) => ({ head, cells: names.map((_, run) => cell(run, language)) })));
    }
  }
}

const withMean = (bits) => [...bits, bits.reduce((sum, number) => sum + number, 0) / bits.length];

/** The base and the adapters in their order, each with what is known of it. */
function runsOf(experiment) {
  const kinds = experiment?.settings.kinds ?? ADAPTERS;
  return [
    { kind: "base", run: experiment?.base },
    ...kinds.map((kind) => ({ kind, run: experiment?.adapters.find((run) => run.kind === kind) })),
  ];
}

/** Size, progress and speed of every run. */
export function runs(table, experiment) {
  const rows = runsOf(experiment).map(({ kind, run }) => {
    const time = run?.stepTime();
    return {
      head: { text: LABELS[kind], className: "run", colour: kind, title: run?.name },
      cells: [
        run ? run.parameters.toLocaleString("en") : NONE,
        run ? String(run.losses.length) : NONE,
        time ? Math.round((1000 * experiment.tokensPerStep) / time).toLocaleString("en") : NONE,
      ],
    };
  });
  fill(table, ["Adapter", "Weights", "Steps", "Bytes/s"], rows);
}

// One experiment: the base learns, is frozen, and the adapters then take a step in turn. It owns every trainer and frees each.

/** Thrown inside `run` when `stop` was called. */
class Stopped extends Error {}

/** The settings do not go together; the message is the crate's. */
export class Refused extends Error {}

/** The names of the crate's errors that settings are to blame for. */
const REFUSALS = ["Setting", "Shape", "Limit"];
/** Of the whole time, the part that looking at held-out text may take. */
const INSPECTING = 0.25;
/** Steps that speed is measured over. */
const SPEED_SPAN = 20;

/** What is known of one trainer, for the pictures. */
class Run {
  constructor(kind, trainer, steps) {
    this.kind = kind;
    this.name = trainer.name();
    this.parameters = trainer.parameters();
    this.steps = steps;
    this.losses = [];
    this.inspection = null;
    /** How many steps it had made when it was inspected. */
    this.inspectedAt = 0;
    this.durations = [];
    this.trainer = trainer;
  }

  /** Milliseconds a step, over the last few. */
  stepTime() {
    const recent = this.durations.slice(-SPEED_SPAN);
    return recent.reduce((sum, time) => sum + time, 0) / recent.length;
  }

  async step() {
    const start = performance.now();
    const loss = await this.trainer.step();
    this.durations.push(performance.now() - start);
    if (!Number.isFinite(loss)) {
      throw new Error(`${this.name}: the loss is no longer a number after ${this.losses.length + 1} steps`);
    }
    this.losses.push(loss);
  }

  async inspect() {
    this.inspection = await this.trainer.inspect();
    this.inspectedAt = this.losses.length;
  }

  isInspected() {
    return this.inspection !== null && this.inspectedAt === this.losses.length;
  }
}

export class Experiment {
  #lab;
  #changed;
  #resume = null;
  #paused = false;
  #stopped = false;
  #trainers = [];

  /** `changed(news)` is called after everything that happens, with a sentence where it is worth saying aloud. */
  constructor(lab, settings, changed) {
    this.#lab = lab;
    this.#changed = changed;
    this.settings = settings;
    this.tokensPerStep = lab.tokens_per_step();
    this.base = null;
    this.adapters = [];
  }

  get paused() {
    return this.#paused;
  }

  /** Steps made and steps to make. */
  progress() {
    const { baseSteps, steps, kinds } = this.settings;
    const done = (this.base?.losses.length ?? 0) + this.adapters.reduce((sum, run) => sum + run.losses.length, 0);
    return { done, all: baseSteps + steps * kinds.length };
  }

  pause() {
    this.#paused = true;
  }

  resume() {
    this.#paused = false;
    this.#resume?.();
  }

  /** Ends the experiment as soon as the step that is under way has come back. */
  stop() {
    this.#stopped = true;
    this.resume();
  }

  /** Trains to the end; true, or false where it was stopped. Throws `Refused` for settings, and what a step throws. */
  async run() {
    try {
      await this.#train();
      return true;
    } catch (error) {
      if (error instanceof Stopped) return false;
      throw error;
    } finally {
      for (const trainer of this.#trainers.splice(0).reverse()) trainer.free();
    }
  }

  /** Stands between any two things that are awaited: here an experiment pauses and ends. */
  async #turn() {
    while (this.#paused && !this.#stopped) {
      this.#changed("Paused.");
      await new Promise((resolve) => (this.#resume = resolve));
      this.#resume = null;
    }
    if (this.#stopped) throw new Stopped();
  }

  async #own(promise) {
    const trainer = await promise;
    this.#trainers.push(trainer);
    await this.#turn();
    return trainer;
  }

  async #train() {
    const { seed, baseSteps, steps, kinds } = this.settings;
    const base = await this.#own(this.#lab.base(seed));
    // The base's weights are on the device once: adapters made now have whatever it learns. So settings that do not go together are
    // refused at once.
    const adapters = [];
    for (const kind of kinds) adapters.push(await this.#adapter(base, kind));
    this.base = new Run("base", base, baseSteps);
    this.adapters = kinds.map((kind, index) => new Run(kind, adapters[index], steps));

    this.#changed("The base learns English.");
    for (let step = 0; step < baseSteps; step++) await this.#do(() => this.base.step());
    this.#changed("The base is frozen; the adapters learn eight languages.");
    // Milliseconds of work, pauses not among them.
    let [spent, looked] = [0, 0];
    for (let step = 0; step < steps; step++) {
      for (const run of this.adapters) spent += await this.#do(() => run.step());
      // Pictures first: what turns and who serves whom is seen from the beginning.
      if (looked > spent * INSPECTING) continue;
      const time = await this.#look();
      looked += time;
      spent += time;
    }
    for (const run of [this.base, ...this.adapters]) {
      if (!run.isInspected()) await this.#do(() => run.inspect());
    }
  }

  /** Inspects the run that was not inspected for longest; the milliseconds it took. */
  #look() {
    const age = (run) => (run.inspection ? run.losses.length - run.inspectedAt : Infinity);
    // Of equals the last, which is RotMoLE where it is trained. The base no longer changes: once is enough.
    const run = [this.base, ...this.adapters].reduce((oldest, other) => (age(other) >= age(oldest) ? other : oldest));
    return this.#do(() => run.inspect());
  }

  /** The milliseconds that the work took, once it had its turn. */
  async #do(work) {
    await this.#turn();
    const start = performance.now();
    await work();
    const time = performance.now() - start;
    // What came back after a stop is nobody's.
    if (this.#stopped) throw new Stopped();
    this.#changed();
    return time;
  }

  async #adapter(base, kind) {
    const { rank, experts, topK, rotation, steps, seed } = this.settings;
    try {
      return await this.#own(this.#lab.adapter(base, { kind, rank, experts, top_k: topK, rotation, steps, seed }));
    } catch (error) {
      throw REFUSALS.includes(error.name) ? new Refused(error.message) : error;
    }
  }
}

// The form: reads the experiment's settings, and keeps those that cannot go together from being chosen.

export class Settings {
  #form;
  /** The last number of each field that was one it takes. */
  #numbers = {};

  constructor(form) {
    this.#form = form;
    form.addEventListener("input", () => this.#agree());
    this.#agree();
  }

  /** The settings, at any time: of a field that is off the default, of one that is being typed into its last good number. */
  read() {
    return {
      kinds: this.#kinds(),
      rank: this.#number("rank"),
      experts: this.#number("experts"),
      topK: this.#number("top_k"),
      rotation: this.#form.elements.rotation.value,
      baseSteps: this.#number("base_steps"),
      steps: this.#number("steps"),
      seed: this.#number("seed"),
    };
  }

  #number(name) {
    const field = this.#form.elements[name];
    if (field.disabled) return Number(field.defaultValue);
    const number = field.valueAsNumber;
    if (Number.isInteger(number) && number >= Number(field.min) && number <= Number(field.max)) this.#numbers[name] = number;
    return this.#numbers[name] ?? Number(field.defaultValue);
  }

  /** While an experiment runs its settings stay what they were. */
  lock(locked) {
    for (const fieldset of this.#form.querySelectorAll("fieldset")) fieldset.disabled = locked;
  }

  #kinds() {
    return [...this.#form.elements.kind].filter((box) => box.checked).map((box) => box.value);
  }

  #agree() {
    const { kind, experts, top_k: topK, rotation } = this.#form.elements;
    const kinds = this.#kinds();
    kind[0].setCustomValidity(kinds.length === 0 ? "Choose at least one adapter." : "");
    const routed = kinds.some((name) => name !== "lora");
    experts.disabled = topK.disabled = !routed;
    rotation.disabled = !kinds.includes("rotmole");
    // A number that is being typed, or is out of range, is the browser's to complain about.
    if (experts.disabled || !experts.validity.valid) return;
    const most = experts.valueAsNumber;
    topK.max = most;
    if (topK.valueAsNumber > most) topK.value = most;
    document.getElementById("top_k-hint").textContent = most === 1 ? "Top k: there is only one." : `Top k: at most the ${most} there are.`;
  }
}

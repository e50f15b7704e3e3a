// The form: reads the experiment's settings, and keeps those that cannot go together from being chosen.

const number = (form, name) => form.elements[name].valueAsNumber;

export class Settings {
  #form;

  constructor(form) {
    this.#form = form;
    form.addEventListener("input", () => this.#agree());
    this.#agree();
  }

  read() {
    const form = this.#form;
    return {
      kinds: this.#kinds(),
      rank: number(form, "rank"),
      experts: number(form, "experts"),
      topK: number(form, "top_k"),
      rotation: form.elements.rotation.value,
      baseSteps: number(form, "base_steps"),
      steps: number(form, "steps"),
      seed: number(form, "seed"),
    };
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
    if (!experts.validity.valid) return;
    const most = experts.valueAsNumber;
    topK.max = most;
    if (topK.valueAsNumber > most) topK.value = most;
    document.getElementById("top_k-hint").textContent = most === 1 ? "Top k: there is only one." : `Top k: at most the ${most} there are.`;
  }
}

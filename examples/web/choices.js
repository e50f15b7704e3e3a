// What a select offers, where that changes with what is trained.

/** The options 1 to `count`, with values from 0. */
export function numbered(count) {
  return Array.from({ length: count }, (_, index) => ({ value: String(index), text: String(index + 1) }));
}

/** Makes a select offer these, keeping what is chosen where it still exists. */
export function choices(select, options) {
  if (select.length === options.length && options.every(({ value }, index) => select.options[index].value === value)) return;
  const chosen = select.value;
  select.replaceChildren(...options.map(({ value, text }) => new Option(text, value)));
  if (options.some(({ value }) => value === chosen)) select.value = chosen;
}

// Tables are written once and then only their text changes: nothing moves, and a screen reader keeps its place.

/**
 * Makes the table's cells be `rows`; a row is `{head, cells, name}`, a cell or head is a string or `{text, className, share, colour, title}`.
 * The elements stay where the numbers of rows and columns do.
 */
export function fill(table, columns, rows) {
  if (table.tHead?.rows[0]?.cells.length !== columns.length || table.tBodies[0]?.rows.length !== rows.length) {
    build(table, columns.length, rows.length);
  }
  const heads = table.tHead.rows[0].cells;
  columns.forEach((column, index) => write(heads[index], column));
  rows.forEach((row, index) => {
    const element = table.tBodies[0].rows[index];
    element.className = row.name ?? "";
    write(element.cells[0], row.head);
    row.cells.forEach((cell, column) => write(element.cells[column + 1], cell));
  });
}

function build(table, columns, rows) {
  const cell = (tag, scope) => {
    const element = document.createElement(tag);
    if (scope) element.scope = scope;
    return element;
  };
  const head = document.createElement("thead");
  head.append(document.createElement("tr"));
  head.rows[0].append(...Array.from({ length: columns }, () => cell("th", "col")));
  const body = document.createElement("tbody");
  for (let row = 0; row < rows; row++) {
    const element = document.createElement("tr");
    element.append(cell("th", "row"), ...Array.from({ length: columns - 1 }, () => cell("td")));
    body.append(element);
  }
  table.replaceChildren(head, body);
}

function write(element, content) {
  const { text, className = "", share, colour, title = "" } = typeof content === "string" ? { text: content } : content;
  if (element.textContent !== text) element.textContent = text;
  if (element.className !== className) element.className = className;
  if (share !== undefined) element.style.setProperty("--share", share.toFixed(3));
  else element.style.removeProperty("--share");
  if (element.title !== title) element.title = title;
  if (colour !== undefined) element.style.setProperty("--run-colour", `var(--run-${colour})`);
}

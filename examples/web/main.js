// The page: one lab, one experiment at a time, and the pictures that follow it.

import { Curves } from "./curves.js";
import { Experiment, Refused } from "./experiment.js";
import { brokenPage, Failure, isOurs, isTrap, openLab, trainingFailure } from "./lab.js";
import { Settings } from "./settings.js";
import { ExpertMap, HeldOut, runs } from "./reports.js";
import { Wheels } from "./wheels.js";

const part = (id) => document.getElementById(id);
const runButton = part("run");
const resetButton = part("reset");
const settings = new Settings(part("settings"));
const curves = new Curves(part("curves-canvas"), part("curves-table"));

let lab = null;
let map;
let wheels;
let heldOut;

/** loading, idle, running, paused, done, failed: what the buttons do. */
let state = "loading";
let experiment = null;
/** Settles when the last experiment has freed what it had. */
let ended = Promise.resolve();
let frame = 0;
/** After a fault of the page itself only loading it again helps. What was awaited then may never come. */
let broken = false;
let giveUp;
const givenUp = new Promise((resolve) => (giveUp = resolve));

function enter(next, words) {
  state = next;
  const failed = broken ? "Reload the page" : "Try again";
  runButton.textContent = { running: "Pause", paused: "Resume", done: "Start again", failed }[state] ?? "Start";
  runButton.setAttribute("aria-disabled", String(state === "loading"));
  resetButton.setAttribute("aria-disabled", String(experiment === null || broken));
  const locked = broken || ["loading", "running", "paused"].includes(state);
  // A field that is disabled loses the keyboard.
  if (locked && document.activeElement?.closest("#settings fieldset")) runButton.focus();
  settings.lock(locked);
  document.documentElement.dataset.state = state;
  if (words !== undefined) part("status").textContent = words;
}

function fail(failure) {
  const box = part("failure");
  const title = document.createElement("h2");
  title.textContent = failure.message;
  const reason = document.createElement("p");
  reason.className = "reason";
  reason.textContent = failure.reason;
  const list = document.createElement("ul");
  list.append(
    ...failure.advice.map((advice) => {
      const item = document.createElement("li");
      item.textContent = advice;
      return item;
    }),
  );
  box.replaceChildren(title, reason, list);
  box.hidden = false;
  enter("failed", failure.message + ".");
}

/** Ends everything after a fault of the page itself. */
function breakDown(error) {
  if (broken) return;
  broken = true;
  // Not freed: its WebAssembly may be what failed.
  lab = null;
  experiment?.stop();
  giveUp();
  complain();
  fail(brokenPage(error));
}

function complain(words) {
  part("complaint").textContent = words ?? "";
  part("complaint").hidden = !words;
}

/** Draws what the experiment knows, once a frame. */
function draw() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    // Without the languages, which the first device brings, there are no pictures yet.
    if (!wheels) return;
    const shown = experiment?.settings ?? settings.read();
    const rotmole = experiment?.adapters.find((run) => run.kind === "rotmole")?.inspection ?? null;
    curves.show(experiment);
    map.show(rotmole, shown);
    wheels.show(rotmole, shown);
    heldOut.show(experiment);
    runs(part("runs-table"), experiment);
    const { done, all } = experiment?.progress() ?? { done: 0, all: 1 };
    part("progress").max = all;
    part("progress").value = done;
  });
}

async function open() {
  lab = await openLab();
  const languages = lab.languages();
  part("adapter-name").textContent = lab.adapter_name();
  map ??= new ExpertMap(part("map-table"), part("map-layer"), languages);
  heldOut ??= new HeldOut(part("held-out-table"), languages);
  wheels ??= new Wheels(
    {
      canvas: part("wheels-canvas"),
      caption: part("wheels-caption"),
      layer: part("wheel-layer"),
      plane: part("wheel-plane"),
      languages: part("wheel-languages"),
      table: part("wheels-table"),
    },
    languages,
  );
}

function closeLab() {
  lab?.free();
  lab = null;
}

async function start() {
  complain();
  part("failure").hidden = true;
  const chosen = settings.read();
  experiment?.stop();
  experiment = null;
  enter("loading", "Compiling the kernels for this GPU …");
  await ended;
  if (broken) return;
  let mine = null;
  try {
    if (!lab) await open();
    if (broken) return;
    mine = experiment = new Experiment(lab, chosen, (words) => {
      if (experiment !== mine) return;
      if (words && (state === "running" || state === "paused")) part("status").textContent = words;
      draw();
    });
    enter("running");
    const running = mine.run();
    ended = Promise.race([running.then(() => {}, () => {}), givenUp]);
    if ((await running) && experiment === mine) enter("done", "Done: every adapter has made all its steps.");
  } catch (error) {
    if (broken) return;
    if (isTrap(error)) {
      breakDown(error);
      return;
    }
    // Whoever pressed Reset does not want to hear of it, but a broken device is not used again.
    if (!(error instanceof Refused)) closeLab();
    if (experiment !== mine) return;
    if (error instanceof Refused) {
      experiment = null;
      complain(error.message);
      enter("idle", "These settings do not go together.");
    } else {
      fail(error instanceof Failure ? error : trainingFailure(error));
    }
    draw();
  }
}

function reset() {
  experiment?.stop();
  experiment = null;
  complain();
  part("failure").hidden = true;
  enter("idle", "Ready.");
  draw();
}

part("settings").addEventListener("submit", (event) => {
  event.preventDefault();
  if (broken) {
    location.reload();
  } else if (state === "running") {
    experiment.pause();
    enter("paused", "Pausing when this step is back …");
  } else if (state === "paused") {
    experiment.resume();
    enter("running", "Training goes on.");
  } else if (state !== "loading") {
    start();
  }
});
runButton.addEventListener("click", (event) => {
  // The second click of a double click is no wish to pause what the first has started.
  if (event.detail > 1) event.preventDefault();
});
resetButton.addEventListener("click", () => {
  if (resetButton.getAttribute("aria-disabled") !== "true") reset();
});
part("settings").addEventListener("input", () => {
  complain();
  draw();
});

globalThis.addEventListener("error", ({ error }) => {
  if (isOurs(error)) breakDown(error);
});
globalThis.addEventListener("unhandledrejection", ({ reason }) => {
  if (isOurs(reason)) breakDown(reason);
});

try {
  await open();
  if (!broken) enter("idle", "Ready.");
} catch (error) {
  if (!broken) fail(error instanceof Failure ? error : new Failure("The page could not start", String(error), ["Reload the page."]));
}
draw();

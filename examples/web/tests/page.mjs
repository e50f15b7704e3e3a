// The page in a real browser, as its visitors use it: by keyboard and by its own words. Run by scripts/test_web.sh.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { axe, launch, page as folder, serve } from "./browser.mjs";

/** In the order of the page. */
const ADAPTERS = ["LoRA", "MoE-LoRA", "RotMoLE"];
const DESKTOP = { width: 1280, height: 900 };
const PHONE = { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true, deviceScaleFactor: 2 };
/** Milliseconds that a driver on two busy cores may take for what takes a GPU one. */
const PATIENCE = 180_000;
/** Settings that are over soon, in the page's own fields. */
const SHORT = { rank: 4, experts: 3, top_k: 2, base_steps: 1, steps: 2 };

let server;
let browser;
before(async () => {
  server = await serve(folder);
  browser = await launch();
});
after(async () => {
  await browser?.close();
  await server?.close();
});

/** Opens the page; `tampering` runs in it before its own scripts. */
async function open({ tampering, state = "idle", url = server.url, prepare, ...options } = {}) {
  const context = await browser.newContext({ viewport: DESKTOP, bypassCSP: false, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  page.complaints = [];
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) page.complaints.push(message.text());
  });
  page.on("pageerror", (error) => page.complaints.push(String(error)));
  if (tampering) await page.addInitScript(tampering);
  await prepare?.(page);
  await page.goto(url);
  await reach(page, state);
  return page;
}

const reach = (page, state) => page.waitForFunction((wanted) => document.documentElement.dataset.state === wanted, state);

async function choose(page, settings) {
  for (const [name, value] of Object.entries(settings)) {
    if (name === "rotation") await page.selectOption("#rotation", value);
    else await page.fill(`#${name}`, String(value));
  }
}

/** A table's cells as text: a list of rows. */
const table = (page, id) =>
  page.evaluate((id) => [...document.querySelectorAll(`#${id} tr`)].map((row) => [...row.cells].map((cell) => cell.textContent)), id);

/** Of the table of runs: {name: {title, weights, steps, speed}}. */
async function runs(page) {
  const [, ...rows] = await table(page, "runs-table");
  const titles = await page.$$eval("#runs-table tbody th", (heads) => heads.map((head) => head.title));
  return Object.fromEntries(rows.map(([name, weights, steps, speed], row) => [name, { title: titles[row], weights, steps: Number(steps) || 0, speed }]));
}

const stepsMade = async (page) => Object.values(await runs(page)).reduce((sum, { steps }) => sum + steps, 0);

/** Watches what the curves' picture says of itself: each adapter's loss whenever it changed, smoothed as it is drawn. */
const watchLosses = (page) =>
  page.evaluate(() => {
    const canvas = document.getElementById("curves-canvas");
    globalThis.seen = {};
    const look = () => {
      for (const [, name, loss] of canvas.getAttribute("aria-label").matchAll(/([\w-]+) (\d+\.\d+)/g)) {
        const list = (globalThis.seen[name] ??= []);
        if (list.at(-1) !== Number(loss)) list.push(Number(loss));
      }
    };
    new MutationObserver(look).observe(canvas, { attributeFilter: ["aria-label"] });
  });

/** How many pixels of a canvas are painted, and a sum that changes with them. */
const painted = (page, id) =>
  page.evaluate((id) => {
    const canvas = document.getElementById(id);
    const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext("2d", { willReadFrequently: true });
    copy.drawImage(canvas, 0, 0);
    const { data } = copy.getImageData(0, 0, canvas.width, canvas.height);
    let [count, sum] = [0, 0];
    for (let index = 0; index < data.length; index += 4) {
      if (data[index + 3] > 0) count++;
      sum = (sum * 31 + data[index] + 7 * data[index + 1] + 13 * data[index + 2] + data[index + 3]) % 1_000_000_007;
    }
    return { part: count / (canvas.width * canvas.height), sum };
  }, id);

/** RotMoLE was looked at: its experts have a share. */
const looked = (page) => page.waitForFunction(() => /\d %/.test(document.getElementById("map-table").textContent));

/** What has happened is on the page, which draws once a frame. */
const drawn = (page) => page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done()))));

/** Trains to the end, reads what is shown, and resets. What is shown before the end depends on how fast the machine is. */
async function trainABit(page, settings) {
  await choose(page, settings);
  await page.click("#run");
  await reach(page, "done");
  await drawn(page);
  const shown = {
    runs: await runs(page),
    map: await table(page, "map-table"),
    curves: await page.getAttribute("#curves-canvas", "aria-label"),
    angles: await table(page, "wheels-table"),
    wheels: await painted(page, "wheels-canvas"),
  };
  await page.click("#reset");
  await reach(page, "idle");
  return shown;
}

/** Counts the package's trainers that live, and the steps that all of them made, in a page that has loaded it. */
const countTrainers = (page) =>
  page.evaluate(async () => {
    const { Lab, Trainer } = await import("/pkg/rankmix_web.js");
    globalThis.alive = 0;
    globalThis.steps = 0;
    for (const name of ["base", "adapter"]) {
      const make = Lab.prototype[name];
      Lab.prototype[name] = async function (...settings) {
        const trainer = await make.apply(this, settings);
        globalThis.alive++;
        return trainer;
      };
    }
    const { free, step } = Trainer.prototype;
    Trainer.prototype.free = function () {
      globalThis.alive--;
      free.call(this);
    };
    Trainer.prototype.step = function () {
      globalThis.steps++;
      return step.call(this);
    };
  });
const alive = (page) => page.evaluate(() => globalThis.alive);
const firstLosses = (page) =>
  page.waitForFunction(() => /RotMoLE \d/.test(document.getElementById("curves-canvas").ariaLabel));

test("Start by keyboard: within 60 steps the loss of each adapter falls, and every picture forms", async (t) => {
  const page = await open();
  assert.notEqual(await page.textContent("#adapter-name"), "");
  await watchLosses(page);
  const pictures = ["curves-canvas", "wheels-canvas"];
  const empty = await Promise.all(pictures.map((id) => painted(page, id)));
  await page.evaluate(() => {
    globalThis.shift = 0;
    new PerformanceObserver((list) => list.getEntries().forEach((entry) => (globalThis.shift += entry.value))).observe({ type: "layout-shift" });
    globalThis.longest = 0;
    let last = performance.now();
    const frame = (now) => {
      globalThis.longest = Math.max(globalThis.longest, now - last);
      last = now;
      requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
  });
  while ((await page.evaluate(() => document.activeElement.id)) !== "run") await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  const begun = performance.now();
  // Of the mean of the last steps, as it is drawn; noise between two steps is about 0.15.
  await page.waitForFunction(
    (names) => names.every((name) => globalThis.seen[name]?.length > 3 && globalThis.seen[name].at(-1) < globalThis.seen[name][0] - 0.5),
    ADAPTERS,
  );
  t.diagnostic(`every loss fell by more than 0.5 within ${((performance.now() - begun) / 1000).toFixed(0)} s`);
  // How fast that is depends on the machine; after how many steps does not.
  const [fallen, seen] = [await runs(page), await page.evaluate(() => globalThis.seen)];
  for (const name of ADAPTERS) {
    const { steps, speed } = fallen[name];
    t.diagnostic(`${name}: ${seen[name][0]} to ${seen[name].at(-1)} bits per byte, ${steps} steps, ${speed} bytes/s`);
    assert.ok(steps <= 60, `${name} took ${steps} steps`);
  }
  await looked(page);
  await page.waitForFunction(() => /[1-9]\d*°/.test(document.getElementById("wheels-table").textContent));
  const full = await Promise.all(pictures.map((id) => painted(page, id)));
  pictures.forEach((id, index) => {
    assert.notEqual(full[index].sum, empty[index].sum, `${id} stayed as it was`);
    assert.ok(full[index].part > empty[index].part + 0.002, `${id}: nothing was added`);
  });
  const [, ...map] = await table(page, "map-table");
  assert.equal(map.length, 8);
  for (const [language, ...shares] of map) {
    const sum = shares.reduce((sum, share) => sum + parseInt(share, 10), 0);
    assert.ok(Math.abs(sum - 100) <= shares.length / 2, `${language}: ${shares}`);
  }
  const { shift, longest } = await page.evaluate(() => ({ shift: globalThis.shift, longest: globalThis.longest }));
  t.diagnostic(`layout shift ${shift.toFixed(4)}; longest time between two frames ${longest.toFixed(0)} ms`);
  assert.ok(shift < 0.01, `the page moved by ${shift}`);
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("Pause stops, Resume goes on, Reset clears, and everything is freed", async () => {
  const page = await open();
  await countTrainers(page);
  await choose(page, { base_steps: 2, steps: 500 });
  await page.click("#run");
  await firstLosses(page);
  assert.equal(await page.textContent("#run"), "Pause");
  assert.ok(await page.isDisabled("#rank"), "settings can be changed while they are in use");
  await page.click("#run");
  assert.equal(await page.textContent("#run"), "Resume");
  await page.waitForFunction(() => document.getElementById("status").textContent === "Paused.");
  const paused = await page.evaluate(() => globalThis.steps);
  await page.waitForTimeout(3000);
  assert.equal(await page.evaluate(() => globalThis.steps), paused);
  assert.equal(await alive(page), 4);
  await page.click("#run");
  await page.waitForFunction((paused) => globalThis.steps > paused + 1, paused);

  await page.click("#reset");
  await reach(page, "idle");
  await page.waitForFunction(() => globalThis.alive === 0);
  await drawn(page);
  assert.match(await page.getAttribute("#curves-canvas", "aria-label"), /Nothing trained yet/);
  assert.match(await page.getAttribute("#wheels-canvas", "aria-label"), /nothing trained yet/);
  for (const id of ["map-table", "held-out-table"]) {
    assert.deepEqual(new Set((await table(page, id)).slice(1).flatMap(([, ...cells]) => cells)), new Set(["–"]), id);
  }
  assert.equal(await stepsMade(page), 0);
  assert.equal(await page.getAttribute("#progress", "value"), "0");

  // Reset before anything has come back, start at once again, and go to the end.
  await choose(page, SHORT);
  await page.uncheck("input[value=lora]");
  await page.uncheck("input[value=moe_lora]");
  await page.click("#run");
  await reach(page, "running");
  await page.click("#reset");
  await page.click("#run");
  await reach(page, "done");
  await drawn(page);
  assert.equal(await page.textContent("#run"), "Start again");
  await page.waitForFunction(() => document.querySelector("#progress").position === 1);
  assert.deepEqual(Object.entries(await runs(page)).map(([name, { steps }]) => [name, steps]), [["Base", 1], ["RotMoLE", 2]]);
  const heldOut = (await table(page, "held-out-table")).slice(1);
  for (const [name, ...bits] of heldOut) {
    assert.equal(bits.length, 9, name);
    for (const number of bits) assert.ok(parseFloat(number) > 3 && parseFloat(number) < 9, `${name}: ${bits}`);
  }
  assert.equal(await alive(page), 0);
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("Every control changes what is trained, and the same settings give the same result", async () => {
  const page = await open();
  const first = await trainABit(page, SHORT);
  assert.deepEqual(Object.keys(first.runs), ["Base", ...ADAPTERS]);

  const rank = await trainABit(page, { rank: 8 });
  for (const name of ADAPTERS) assert.notEqual(rank.runs[name].weights, first.runs[name].weights, `rank: ${name}`);
  const experts = await trainABit(page, { rank: SHORT.rank, experts: 5 });
  assert.equal(experts.runs.LoRA.weights, first.runs.LoRA.weights);
  for (const name of ["MoE-LoRA", "RotMoLE"]) assert.notEqual(experts.runs[name].weights, first.runs[name].weights, `experts: ${name}`);
  assert.equal(experts.map[0].length, 6);

  // RotMoLE alone from here on.
  await page.uncheck("input[value=lora]");
  await page.uncheck("input[value=moe_lora]");
  const alone = await trainABit(page, { experts: SHORT.experts });
  assert.deepEqual(Object.keys(alone.runs), ["Base", "RotMoLE"]);
  assert.equal(alone.runs.RotMoLE.weights, first.runs.RotMoLE.weights);
  const again = await trainABit(page, {});
  for (const what of ["map", "curves", "angles", "wheels"]) assert.deepEqual(again[what], alone[what], what);
  assert.notDeepEqual((await trainABit(page, { top_k: 1 })).map, alone.map);
  const seed = await trainABit(page, { top_k: SHORT.top_k, seed: 8 });
  assert.notDeepEqual(seed.map, alone.map);
  assert.notEqual(seed.curves, alone.curves);

  const titles = new Set();
  const weights = new Set();
  const rotations = await page.$$eval("#rotation option", (options) => options.map((option) => option.value));
  for (const rotation of rotations) {
    const { runs, wheels, angles } = await trainABit(page, { rotation });
    titles.add(runs.RotMoLE.title);
    weights.add(runs.RotMoLE.weights);
    assert.ok(wheels.part > 0.01, `${rotation}: no wheel is drawn`);
    assert.ok(angles.slice(1).flat().some((cell) => /°/.test(cell)), `${rotation}: no angle`);
  }
  assert.equal(titles.size, rotations.length, [...titles].join());
  // Of rank 4 a Givens chain, Cayley and a brick wall of 4 layers have as many numbers.
  assert.equal(weights.size, rotations.length - 2, `weights by rotation: ${[...weights]}`);
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("Settings that do not go together are prevented, or refused in the crate's words", async () => {
  const page = await open();
  await choose(page, { experts: 2 });
  assert.equal(await page.getAttribute("#top_k", "max"), "2");
  await choose(page, { experts: 1 });
  assert.equal(await page.inputValue("#top_k"), "1");
  await page.fill("#experts", "99");
  await page.click("#run");
  assert.equal(await page.evaluate(() => document.activeElement.id), "experts");
  await choose(page, { experts: 4, rank: 7 });
  await page.click("#run");
  await page.waitForSelector("#complaint:not([hidden])");
  assert.match(await page.textContent("#complaint"), /rank must be even/);
  assert.equal(await page.textContent("#run"), "Start");
  await choose(page, { rank: 8 });
  assert.ok(await page.isHidden("#complaint"), "the complaint outlived its cause");

  for (const kind of ["lora", "moe_lora", "rotmole"]) await page.uncheck(`input[value=${kind}]`);
  await page.click("#run");
  assert.equal(await page.evaluate(() => document.documentElement.dataset.state), "idle");
  await page.check("input[value=lora]");
  for (const id of ["experts", "top_k", "rotation"]) assert.ok(await page.isDisabled(`#${id}`), `LoRA alone has ${id}`);
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("What is being typed into a field is not drawn before it is a number that the field takes", async () => {
  const page = await open();
  const columns = async () => {
    await drawn(page);
    return page.evaluate(() => ["wheels-table", "map-table"].map((id) => document.getElementById(id).rows[0].cells.length - 1));
  };
  for (const [typed, wanted] of [["", 4], ["-1", 4], ["1.5", 4], ["6", 6], ["1000000000", 6], ["", 6]]) {
    await page.fill("#experts", typed);
    assert.deepEqual(await columns(), [wanted, wanted], `\`${typed}\``);
  }
  // A field that is off, whatever is in it, keeps nothing from starting.
  await page.uncheck("input[value=moe_lora]");
  await page.uncheck("input[value=rotmole]");
  await choose(page, { base_steps: 1, steps: 1 });
  await page.click("#run");
  await reach(page, "done");
  assert.ok(await page.isHidden("#complaint"));
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("Enter in a field starts and leaves the keyboard on the button; a double click only starts", async () => {
  const page = await open();
  await page.focus("#steps");
  await page.keyboard.press("Enter");
  await reach(page, "running");
  assert.equal(await page.evaluate(() => document.activeElement.id), "run");
  await page.click("#reset");
  await page.dblclick("#run");
  await firstLosses(page);
  assert.equal(await page.evaluate(() => document.documentElement.dataset.state), "running");
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("The wheels are drawn when RotMoLE was looked at, and not at every step", async () => {
  const page = await open();
  await countTrainers(page);
  await page.evaluate(async () => {
    globalThis.drawn = globalThis.inspections = 0;
    new MutationObserver((records) => (globalThis.drawn += records.length)).observe(document.getElementById("wheels-canvas"), { attributeFilter: ["aria-label"] });
    const { Trainer } = await import("/pkg/rankmix_web.js");
    const { inspect } = Trainer.prototype;
    Trainer.prototype.inspect = function () {
      globalThis.inspections++;
      return inspect.call(this);
    };
  });
  await page.uncheck("input[value=lora]");
  await page.uncheck("input[value=moe_lora]");
  await choose(page, { ...SHORT, base_steps: 20, steps: 20 });
  await page.click("#run");
  await reach(page, "done");
  const { drawn, inspections, steps } = await page.evaluate(() => ({ drawn: globalThis.drawn, inspections: globalThis.inspections, steps: globalThis.steps }));
  assert.equal(steps, 40);
  assert.ok(drawn > 0 && drawn <= inspections, `drawn ${drawn} times for ${inspections} inspections`);
  await page.context().close();
});

test("A pause changes nothing of what follows it", async () => {
  const page = await open();
  const logs = await page.evaluate(async () => {
    const { Experiment } = await import("/experiment.js");
    let clock = 0;
    performance.now = () => clock;
    /** What is done in which order, with a pause of ten seconds after so many things. */
    const follow = async (pauseAfter) => {
      const log = [];
      const work = (name, result) => async () => {
        clock += 10;
        log.push(name);
        return result;
      };
      const trainer = (kind) => ({ name: () => kind, parameters: () => 1, free() {}, step: work(`${kind} step`, 1), inspect: work(`${kind} inspect`, {}) });
      const lab = { tokens_per_step: () => 1, base: async () => trainer("base"), adapter: async (base, { kind }) => trainer(kind) };
      const settings = { kinds: ["lora", "rotmole"], rank: 4, experts: 2, topK: 1, rotation: "planes", baseSteps: 1, steps: 20, seed: 1 };
      let paused = false;
      const experiment = new Experiment(lab, settings, (words) => {
        if (words === "Paused.") {
          clock += 10_000;
          setTimeout(() => experiment.resume());
        } else if (!paused && log.length === pauseAfter) {
          paused = true;
          experiment.pause();
        }
      });
      await experiment.run();
      return log.join();
    };
    const logs = [];
    for (let pauseAfter = 0; pauseAfter < 10; pauseAfter++) logs.push(await follow(pauseAfter));
    return [await follow(Infinity), ...logs];
  });
  assert.match(logs[0], /inspect/);
  assert.deepEqual(logs, logs.map(() => logs[0]));
  await page.context().close();
});

test("With the network cut after loading it still starts and trains", async () => {
  const own = await serve(folder);
  const page = await open({ url: own.url });
  await page.context().setOffline(true);
  await own.close();
  await trainABit(page, SHORT);
  assert.deepEqual(page.complaints, []);
  await page.context().close();
});

test("A tab that is not seen trains on, and is drawn when it is seen again", async () => {
  const page = await open();
  await countTrainers(page);
  await choose(page, { ...SHORT, steps: 300 });
  await page.click("#run");
  await firstLosses(page);
  // A hidden tab gets no frames: here they are kept back.
  await page.evaluate(async () => {
    const original = globalThis.requestAnimationFrame;
    const waiting = [];
    globalThis.requestAnimationFrame = (callback) => waiting.push(callback);
    globalThis.beSeen = () => {
      globalThis.requestAnimationFrame = original;
      waiting.forEach((callback) => original(callback));
    };
    // What was asked for before is drawn first.
    await new Promise((done) => original(done));
  });
  const hidden = await stepsMade(page);
  const begun = await page.evaluate(() => globalThis.steps);
  await page.waitForFunction((begun) => globalThis.steps > begun + 5, begun, { polling: 100 });
  assert.equal(await stepsMade(page), hidden, "something was drawn that nobody sees");
  await page.evaluate(() => globalThis.beSeen());
  await page.waitForFunction((hidden) => [...document.querySelectorAll("#runs-table td:nth-child(3)")].reduce((sum, cell) => sum + Number(cell.textContent), 0) > hidden + 4, hidden);
  await page.context().close();
});

test("Where it cannot run, the page says why", async () => {
  const cases = {
    "does not offer WebGPU": () => Object.defineProperty(Navigator.prototype, "gpu", { get: () => undefined }),
    "No graphics adapter": () => (GPU.prototype.requestAdapter = async () => null),
  };
  for (const [words, tampering] of Object.entries(cases)) {
    const page = await open({ tampering, state: "failed" });
    assert.match(await page.textContent("#failure h2"), new RegExp(words));
    assert.ok((await page.$$("#failure li")).length > 0, "no advice");
    await page.context().close();
  }
  const page = await open({ prepare: (page) => page.route("**/*.wasm", (route) => route.abort()), state: "failed" });
  assert.match(await page.textContent("#failure h2"), /WebAssembly module did not load/);
  await page.unroute("**/*.wasm");
  await page.click("#run");
  await reach(page, "running");
  assert.ok(await page.isHidden("#failure"));
  await page.context().close();
});

test("A lost device is said, and opened anew", async () => {
  const page = await open({
    tampering: () => {
      const request = GPUAdapter.prototype.requestDevice;
      GPUAdapter.prototype.requestDevice = async function (...wishes) {
        return (globalThis.lastDevice = await request.apply(this, wishes));
      };
    },
  });
  await countTrainers(page);
  await choose(page, { ...SHORT, steps: 300 });
  await page.click("#run");
  await firstLosses(page);
  await page.evaluate(() => globalThis.lastDevice.destroy());
  await reach(page, "failed");
  assert.match(await page.textContent("#failure h2"), /GPU was lost/);
  assert.equal(await alive(page), 0);
  await page.click("#reset");
  await page.waitForFunction(() => /Nothing trained yet/.test(document.getElementById("curves-canvas").ariaLabel));
  assert.equal(await stepsMade(page), 0);
  assert.equal(await page.getAttribute("#progress", "value"), "0");
  await trainABit(page, SHORT);
  await page.context().close();
});

test("WebAssembly that came to a stop is said, whatever was awaited, and the page is loaded again", async () => {
  const page = await open({
    tampering: () => {
      const request = GPUAdapter.prototype.requestDevice;
      GPUAdapter.prototype.requestDevice = async function (...wishes) {
        return (globalThis.lastDevice = await request.apply(this, wishes));
      };
    },
  });
  const said = async () => {
    await reach(page, "failed");
    assert.match(await page.textContent("#failure"), /page itself has failed.*Reload the page/s);
    assert.equal(await page.textContent("#run"), "Reload the page");
    assert.equal(await page.getAttribute("#reset", "aria-disabled"), "true");
    await page.click("#run");
    await reach(page, "idle");
    assert.ok(await page.isHidden("#failure"));
  };
  // wgpu panics when it is told of an error of a kind that it does not know.
  await choose(page, { ...SHORT, steps: 300 });
  await page.click("#run");
  await firstLosses(page);
  await page.evaluate(() => globalThis.lastDevice.dispatchEvent(new GPUUncapturedErrorEvent("uncapturederror", { error: new GPUInternalError("none") })));
  await said();

  // A step that never comes back, and somebody who waits for its end.
  await page.evaluate(async () => {
    const { Trainer } = await import("/pkg/rankmix_web.js");
    Trainer.prototype.step = () => new Promise(() => {});
  });
  await page.click("#run");
  await reach(page, "running");
  await page.click("#reset");
  await page.click("#run");
  await reach(page, "loading");
  await page.evaluate(() => void Promise.reject(new WebAssembly.RuntimeError("unreachable")));
  await said();
  await page.context().close();
});

/** Fails with what axe finds wrong in a page. */
async function checkWithAxe(t, page, when) {
  await page.evaluate(axe);
  const { violations, passes } = await page.evaluate(() => globalThis.axe.run());
  t.diagnostic(`axe, ${when}: ${passes.length} rules passed`);
  assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes[0].html} ${nodes[0].failureSummary}`), [], when);
}

test("Accessible by axe's rules, light and dark, before and after; nothing moves for those who want it so", async (t) => {
  const page = await open({ reducedMotion: "reduce" });
  const both = async (when) => {
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      await checkWithAxe(t, page, `${when}, ${colorScheme}`);
    }
  };
  await both("before");
  await choose(page, SHORT);
  await page.click("#run");
  await reach(page, "done");
  await drawn(page);
  await both("trained");
  assert.equal(await page.$eval(".heat td", (cell) => getComputedStyle(cell).transitionProperty), "none");
  await page.context().close();
});

test("On a phone nothing is wider than the screen, and everything can be touched", async (t) => {
  const page = await open(PHONE);
  await choose(page, SHORT);
  await page.tap("#run");
  await reach(page, "done");
  await drawn(page);
  // Colours that change slowly are on their way.
  await page.evaluate(() => Promise.all(document.getAnimations().map((one) => one.finished)).then(() => {}));
  assert.ok((await page.evaluate(() => document.documentElement.scrollWidth)) <= 360);
  const small = await page.$$eval("button, select, input[type=number], label.choice, summary", (elements) =>
    elements
      .map((element) => [element.id || element.textContent.trim(), element.getBoundingClientRect()])
      .filter(([, { height, width }]) => height < 44 || width < 44)
      .map(([name]) => name),
  );
  assert.deepEqual(small, []);
  await checkWithAxe(t, page, "phone");
  await page.context().close();
});

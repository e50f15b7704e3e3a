// Training in the browser: the loss falls, two runs are equal bit for bit, what is shown of a model makes sense.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";

import { openBlank } from "./browser.mjs";

const BASE_STEPS = 12;
const STEPS = 16;
const COMMON = { rank: 4, experts: 3, top_k: 2, rotation: "planes", steps: 100, seed: 7 };
const ADAPTERS = [
  { kind: "lora" },
  { kind: "moe_lora" },
  { kind: "comol" },
  { kind: "rotmole" },
  { kind: "rotmole", rotation: "givens" },
  { kind: "rotmole", rotation: "cayley" },
  { kind: "rotmole", rotation: "butterfly" },
  { kind: "rotmole", rotation: "brick_wall:2" },
  { kind: "rotmole", rotation: "householder" },
].map((adapter) => ({ ...COMMON, ...adapter }));

let blank;
before(async () => {
  blank = await openBlank();
  await blank.evaluate(async () => {
    globalThis.lab = await globalThis.rankmix.Lab.open();
    /** Runs so many steps; the losses, and milliseconds a step but for the first. */
    globalThis.train = async (trainer, steps) => {
      const losses = [await trainer.step()];
      const start = performance.now();
      while (losses.length < steps) losses.push(await trainer.step());
      return { losses, milliseconds: (performance.now() - start) / (steps - 1) };
    };
    /** An inspection in plain arrays, which can leave the page. */
    globalThis.plain = (inspection) =>
      Object.fromEntries(Object.entries(inspection).map(([name, value]) => [name, value.buffer ? [...value] : value]));
  });
});
after(() => blank?.close());

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
function falls(losses, by) {
  const [first, last] = [mean(losses.slice(0, 3)), mean(losses.slice(-3))];
  assert.ok(losses.every(Number.isFinite), String(losses));
  assert.ok(last < first - by, `from ${first} to ${last}`);
}

test("the lab says what there is", async () => {
  const lab = await blank.evaluate(() => {
    const { lab } = globalThis;
    return [lab.adapter_name(), lab.languages(), lab.base_language(), lab.tokens_per_step()];
  });
  assert.match(lab[0], /^\S.* \(webgpu, .*\)$/);
  assert.deepEqual(lab.slice(1), [["de", "el", "en", "es", "fi", "fr", "pl", "tr"], "en", 256]);
  console.log(lab[0]);
});

test("a base learns, twice the same", async () => {
  const runs = await blank.evaluate(async (steps) => {
    const runs = [];
    for (const seed of [3, 3, 4]) {
      const trainer = await globalThis.lab.base(seed);
      const { losses, milliseconds } = await globalThis.train(trainer, steps);
      runs.push({ losses, milliseconds, name: trainer.name(), bits: [...(await trainer.inspect()).bits] });
      if (seed === 4) globalThis.base = trainer;
      else trainer.free();
      globalThis.baseBits = runs.at(-1).bits;
    }
    return runs;
  }, BASE_STEPS);
  console.log(`base: ${runs[1].milliseconds.toFixed(0)} ms a step, ${mean(runs[1].losses.slice(-3)).toFixed(3)} bits per byte`);
  falls(runs[0].losses, 0.5);
  assert.equal(runs[0].name, "base");
  assert.deepEqual(runs[1].losses, runs[0].losses);
  assert.deepEqual(runs[1].bits, runs[0].bits);
  assert.notDeepEqual(runs[2].losses, runs[0].losses);
  assert.equal(runs[0].bits.length, 8);
});

for (const settings of ADAPTERS) {
  const title = settings.kind === "rotmole" ? `rotmole ${settings.rotation}` : settings.kind;
  test(`${title} learns on the frozen base, twice the same`, async () => {
    const { runs, first, baseBits } = await blank.evaluate(
      async ([settings, steps]) => {
        const { lab, base, baseBits, train, plain } = globalThis;
        const runs = [];
        let first;
        for (let run = 0; run < 2; run++) {
          const trainer = await lab.adapter(base, settings);
          // Only one of the two is looked at before it is trained.
          first ??= plain(await trainer.inspect());
          const trained = await train(trainer, steps);
          const last = plain(await trainer.inspect());
          runs.push({ ...trained, name: trainer.name(), parameters: trainer.parameters(), last });
          trainer.free();
        }
        return { runs, first, baseBits };
      },
      [settings, STEPS],
    );
    const [{ losses, milliseconds, name, parameters, last }, again] = runs;
    console.log(
      `${name}: ${parameters} parameters, ${again.milliseconds.toFixed(0)} ms a step, ` +
        `held out ${mean(first.bits).toFixed(3)} to ${mean(last.bits).toFixed(3)} bits per byte`,
    );
    falls(losses, 0.2);
    assert.ok(parameters > 0);
    assert.ok(mean(last.bits) < mean(first.bits) - 0.1);
    assert.deepEqual(again.losses, losses);
    assert.deepEqual(again.last, last);
    // An adapter starts as the base.
    first.bits.forEach((bits, language) => assert.ok(Math.abs(bits - baseBits[language]) < 1e-4));
    looksRight(settings, first, last);
  });
}

/** The experts' shares sum to 1; the angles are 0 at first, and are those of the gate or of the latents. */
function looksRight({ kind, rank, experts, top_k, rotation }, first, last) {
  const routed = kind === "moe_lora" || kind === "rotmole";
  assert.equal(last.layers, routed ? 2 : 0);
  assert.equal(last.experts, routed ? experts : 0);
  assert.equal(last.shares.length, routed ? 2 * experts * 8 : 0);
  for (let layer = 0; layer < last.layers; layer++) {
    for (let language = 0; language < 8; language++) {
      const shares = Array.from({ length: experts }, (_, expert) => last.shares[(layer * experts + expert) * 8 + language]);
      assert.ok(shares.every((share) => share >= 0));
      assert.ok(Math.abs(mean(shares) * experts - 1) < 1e-4, String(shares));
    }
  }
  if (kind !== "rotmole") {
    assert.equal(last.angles.length, 0);
    return;
  }
  const turn = rotation === "cayley" || rotation === "householder";
  const counts = { planes: rank / 2, givens: (rank * (rank - 1)) / 2, butterfly: (rank / 2) * Math.log2(rank), "brick_wall:2": rank - 1 };
  assert.equal(last.angle_kind, turn ? "turn" : "plane");
  assert.equal(last.angle_count, turn ? 1 : counts[rotation]);
  const entries = last.angle_expert.length;
  assert.ok(entries >= 2 * 8 * top_k);
  assert.equal(last.angle_language.length, entries);
  assert.equal(last.angle_layer.length, entries);
  assert.equal(last.angles.length, entries * last.angle_count);
  assert.deepEqual([...new Set(last.angle_language)], [0, 1, 2, 3, 4, 5, 6, 7]);
  assert.deepEqual([...new Set(last.angle_layer)].sort(), [0, 1]);
  assert.ok(last.angle_expert.every((expert) => expert < experts));
  assert.ok(first.angles.every((angle) => Math.abs(angle) < 1e-6), "the rotation gate starts at zero");
  assert.ok(last.angles.every((angle) => Number.isFinite(angle) && (!turn || (angle >= 0 && angle <= Math.PI + 1e-6))));
  assert.ok(mean(last.angles.map(Math.abs)) > 1e-3, "the rotation gate has learned nothing");
}

test("of a rotation with many planes so many angles are shown as can be", async () => {
  const last = await blank.evaluate(async (settings) => {
    const trainer = await globalThis.lab.adapter(globalThis.base, settings);
    const last = globalThis.plain(await trainer.inspect());
    trainer.free();
    return last;
  }, { ...COMMON, kind: "rotmole", rotation: "givens", rank: 20 });
  const { angles, angle_count: count, angle_language: languages, angle_layer: layers } = last;
  assert.equal(count, 190);
  assert.equal(angles.length, count * languages.length);
  // No layer and no language is left out: the longest text has twice the bytes of the shortest.
  assert.ok(angles.length > 2 ** 18 && angles.length < 1.1 * 2 ** 19, `${angles.length} angles`);
  const entries = Array.from({ length: 16 }, (_, spot) => languages.filter((language, entry) => 2 * language + layers[entry] === spot).length);
  assert.ok(Math.min(...entries) > 0.45 * Math.max(...entries), String(entries));
});

test("the base is as it was before all adapters", async () => {
  const [before, after] = await blank.evaluate(async () => [globalThis.baseBits, [...(await globalThis.base.inspect()).bits]]);
  assert.deepEqual(after, before);
});

test("two trainers at once do not disturb each other", async () => {
  const [alone, together] = await blank.evaluate(async (all) => {
    const { lab, base, train } = globalThis;
    const runs = [];
    for (const settings of all) {
      const trainer = await lab.adapter(base, settings);
      runs.push((await train(trainer, 4)).losses);
      trainer.free();
    }
    const trainers = await Promise.all(all.map((settings) => lab.adapter(base, settings)));
    const together = await Promise.all(trainers.map((trainer) => train(trainer, 4)));
    trainers.forEach((trainer) => trainer.free());
    return [runs, together.map(({ losses }) => losses)];
  }, [ADAPTERS[0], ADAPTERS[3]]);
  assert.deepEqual(together, alone);
});

test("a call while a step is awaited is refused, and the step goes on", async () => {
  const outcome = await blank.evaluate(async (settings) => {
    const { lab, base, rejection } = globalThis;
    const trainer = await lab.adapter(base, settings);
    const step = trainer.step();
    const [second, inspect] = [await rejection(() => trainer.step()), await rejection(() => trainer.inspect())];
    const [loss, next] = [await step, await trainer.step()];
    // Freed while at work: the promise keeps what it needs.
    const last = trainer.step();
    trainer.free();
    return { second, inspect, losses: [loss, next, await last] };
  }, ADAPTERS[0]);
  for (const refused of [outcome.second, outcome.inspect]) {
    assert.equal(refused?.name, "Busy");
    assert.match(refused.message, /await its last promise/);
  }
  assert.ok(outcome.losses.every(Number.isFinite));
});

test("the console stayed silent", () => assert.deepEqual(blank.said, []));

// Every golden case, in the browser: the same kernels through another compiler, on the browser's GPU and on the CPU executor in
// WebAssembly.
import assert from "node:assert/strict";
import { readdirSync } from "node:fs";
import { after, before, test } from "node:test";

import { golden, openBlank } from "./browser.mjs";

const cases = readdirSync(golden).filter((file) => file.endsWith(".safetensors")).sort();

let blank;
before(async () => (blank = await openBlank()));
after(() => blank?.close());

for (const device of ["webgpu", "cpu"]) {
  for (const storage of ["f32", "f16"]) {
    test(`golden cases on ${device}, stored in ${storage}`, async (t) => {
      const name = await blank.evaluate(async (device) => {
        globalThis.lab = await globalThis.rankmix.Lab.open(device);
        return globalThis.lab.adapter_name();
      }, device);
      console.log(`${name}, ${storage}`);
      assert.ok(cases.length > 0);
      for (const file of cases) {
        await t.test(file, { timeout: 120_000 }, async () => {
          const start = performance.now();
          const replay = await blank.evaluate(
            async ([file, storage]) => {
              const response = await fetch(`/golden/${file}`);
              const bytes = new Uint8Array(await response.arrayBuffer());
              return globalThis.lab.replay(file, bytes, storage);
            },
            [file, storage],
          );
          console.log(
            `${replay.ok ? "ok  " : "FAIL"}  ${replay.name.padEnd(28)}  output ${replay.output_error.toExponential(2)}  ` +
              `worst gradient ${replay.gradient_error.toExponential(2)} ${replay.worst_gradient.padEnd(25)}  ` +
              `${((performance.now() - start) / 1000).toFixed(1)} s`,
          );
          assert.ok(replay.ok, JSON.stringify(replay));
        });
      }
      await blank.evaluate(() => globalThis.lab.free());
      assert.deepEqual(blank.said, []);
    });
  }
}

// What a browser does wrong, or a page asks for wrongly, arrives as an `Error` that says what it is. The faults of the browser are
// put into the page by hand, since no driver makes them when asked.
import assert from "node:assert/strict";
import { test } from "node:test";

import { openBlank } from "./browser.mjs";

const SETTINGS = { kind: "rotmole", rank: 4, experts: 3, top_k: 2, rotation: "planes", steps: 10, seed: 1 };

/** A test in an empty page of its own, prepared by a function that runs there before the package is loaded. */
function inPage(title, prepare, work) {
  test(title, async (t) => {
    const blank = await openBlank(prepare);
    try {
      await work(blank, t);
    } finally {
      await blank.close();
    }
  });
}

/** The rejection is an Error of that name, whose message matches. */
function rejected(rejection, name, message) {
  assert.ok(rejection, "it was not rejected");
  assert.ok(rejection.isError);
  assert.equal(rejection.name, name, rejection.message);
  assert.match(rejection.message, message);
}

inPage("settings that do not go together", null, async (blank, t) => {
  await blank.evaluate(async () => {
    globalThis.lab = await globalThis.rankmix.Lab.open();
    globalThis.base = await globalThis.lab.base(1);
  });
  const wrong = [
    [{ rank: 3 }, "Setting", /^rank = 3: planes rotate pairs of coordinates: the rank must be even$/],
    [{ rank: 0, kind: "lora" }, "Setting", /^rank = 0: an adapter needs at least rank 1$/],
    [{ top_k: 4 }, "Setting", /^top_k = 4: must be between 1 and the 3 experts$/],
    [{ experts: 0 }, "Setting", /^experts = 0: there must be at least 1$/],
    [{ rotation: "spiral" }, "Setting", /rotation = spiral: there are planes, givens/],
    [{ rotation: "brick_wall:0" }, "Setting", /rotation = brick_wall:0/],
    [{ rank: 66, rotation: "cayley" }, "Limit", /^a cayley rotation needs 66 dimensions, the limit is 64$/],
    [{ kind: "dora" }, "Setting", /settings: .*`dora`.*`rotmole`/],
    [{ rank: 2.5 }, "Setting", /settings: .*2\.5/],
    [{ rank: -1 }, "Setting", /settings: .*-1/],
    [{ rank: undefined }, "Setting", /settings: .*rank/],
  ];
  for (const [change, name, message] of wrong) {
    await t.test(JSON.stringify(change), async () => {
      const settings = Object.entries({ ...SETTINGS, ...change }).filter(([, value]) => value !== undefined);
      const rejection = await blank.evaluate(
        (settings) => globalThis.rejection(() => globalThis.lab.adapter(globalThis.base, Object.fromEntries(settings))),
        settings,
      );
      rejected(rejection, name, message);
    });
  }
  const loss = await blank.evaluate(() => globalThis.base.step());
  assert.ok(Number.isFinite(loss), "the base is still usable");
  assert.deepEqual(blank.said, []);
});

inPage("golden cases that are none", null, async (blank) => {
  const rejections = await blank.evaluate(async () => {
    const lab = await globalThis.rankmix.Lab.open();
    const bytes = new Uint8Array(await (await fetch("/golden/lora_small.safetensors")).arrayBuffer());
    return [
      await globalThis.rejection(() => lab.replay("cut", bytes.slice(0, 400), "f32")),
      await globalThis.rejection(() => lab.replay("lora_small", bytes, "f64")),
    ];
  });
  rejected(rejections[0], "Format", /^cut: /);
  rejected(rejections[1], "Setting", /storage = f64: there are f32 and f16/);
});

inPage("calls that would wait name the one to await", null, async (blank) => {
  const messages = await blank.evaluate(() => globalThis.rankmix.refusals());
  const call = (name) => `${name} waits for the device, which a browser does not allow: await ${name}_async`;
  assert.deepEqual(
    messages,
    [
      "Device::open",
      "Device::list",
      "Device::wait",
      "ParameterStore::initialize",
      "ParameterStore::convert",
      "ParameterStore::read",
      "ParameterStore::initialize",
      "Session::run",
      "Session::run_reading",
      "Session::read",
      "Session::profile",
      "Session::run",
    ].map(call),
  );
  assert.deepEqual(blank.said, []);
});

inPage("no WebGPU", () => Object.defineProperty(navigator, "gpu", { value: undefined }), async (blank) => {
  const rejection = await blank.evaluate(() => globalThis.rejection(() => globalThis.rankmix.Lab.open()));
  rejected(rejection, "NoWebGpu", /this browser has no WebGPU/);
  // The CPU executor is there all the same.
  const loss = await blank.evaluate(async () => {
    const base = await (await globalThis.rankmix.Lab.open("cpu")).base(1);
    return base.step();
  });
  assert.ok(Number.isFinite(loss));
});

inPage("no adapter", () => (GPU.prototype.requestAdapter = async () => null), async (blank) => {
  const rejections = await blank.evaluate(async () => {
    const { Lab } = globalThis.rankmix;
    return [await globalThis.rejection(() => Lab.open()), await globalThis.rejection(() => Lab.open("arc"))];
  });
  rejected(rejections[0], "NoAdapter", /^no GPU adapter for webgpu: /);
  rejected(rejections[1], "UnknownDevice", /^no device matches `arc`; there is: cpu$/);
});

inPage("a browser that opens no device", () => {
  GPUAdapter.prototype.requestDevice = async () => {
    throw new DOMException("out of devices", "OperationError");
  };
}, async (blank) => {
  const rejection = await blank.evaluate(() => globalThis.rejection(() => globalThis.rankmix.Lab.open()));
  rejected(rejection, "NoAdapter", /out of devices/);
});

/** Keeps the device that the package opens. */
function keepDevice() {
  const { requestDevice } = GPUAdapter.prototype;
  GPUAdapter.prototype.requestDevice = async function (...options) {
    globalThis.device = await requestDevice.apply(this, options);
    return globalThis.device;
  };
}

inPage("a device that is lost: before a step, during one, during an inspection, and for whatever comes after", keepDevice, async (blank) => {
  for (const moment of ["before", "step", "inspect"]) {
    const rejections = await blank.evaluate(async (moment) => {
      const { rankmix, rejection } = globalThis;
      const lab = await rankmix.Lab.open();
      const base = await lab.base(1);
      await base.step();
      let first;
      if (moment === "before") {
        globalThis.device.destroy();
        first = await rejection(() => base.step());
      } else {
        first = await rejection(async () => {
          const work = base[moment]();
          await Promise.resolve();
          globalThis.device.destroy();
          await work;
        });
      }
      const others = [
        await rejection(() => base.step()),
        await rejection(() => base.inspect()),
        await rejection(() => lab.base(2)),
        await rejection(() => lab.adapter(base, { kind: "lora", rank: 2, experts: 1, top_k: 1, rotation: "planes", steps: 1, seed: 1 })),
      ];
      base.free();
      lab.free();
      // Another device can be opened in the same page.
      const again = await (await rankmix.Lab.open()).base(1);
      const loss = await again.step();
      again.free();
      return { first, others, loss };
    }, moment);
    rejected(rejections.first, "DeviceLost", /^the device was lost: /);
    for (const other of rejections.others) rejected(other, "DeviceLost", /^the device was lost: /);
    assert.ok(Number.isFinite(rejections.loss));
  }
  assert.deepEqual(blank.said, []);
});

inPage("a kernel that the browser refuses is named", () => {
  const { createComputePipeline } = GPUDevice.prototype;
  GPUDevice.prototype.createComputePipeline = function (descriptor) {
    const broken = descriptor.label.startsWith("embedding") ? { ...descriptor.compute, entryPoint: "missing" } : descriptor.compute;
    return createComputePipeline.call(this, { label: descriptor.label, layout: descriptor.layout, compute: broken });
  };
}, async (blank) => {
  const rejections = await blank.evaluate(async () => {
    const lab = await globalThis.rankmix.Lab.open();
    const first = await globalThis.rejection(() => lab.base(1));
    return [first, await globalThis.rejection(() => lab.base(2))];
  });
  for (const rejection of rejections) rejected(rejection, "Gpu", /^embedding::\w+: .*missing/s);
  assert.deepEqual(blank.said, []);
});

inPage("a submission that the browser refuses", () => {
  const { dispatchWorkgroups } = GPUComputePassEncoder.prototype;
  globalThis.refuse = () => {
    GPUComputePassEncoder.prototype.dispatchWorkgroups = function () {
      return dispatchWorkgroups.call(this, 1_000_000, 1, 1);
    };
  };
  globalThis.allow = () => (GPUComputePassEncoder.prototype.dispatchWorkgroups = dispatchWorkgroups);
}, async (blank) => {
  const { rejection, loss } = await blank.evaluate(async () => {
    const lab = await globalThis.rankmix.Lab.open();
    const base = await lab.base(1);
    globalThis.refuse();
    const rejection = await globalThis.rejection(() => base.step());
    globalThis.allow();
    return { rejection, loss: await base.step() };
  });
  rejected(rejection, "Gpu", /^a run: /);
  assert.ok(Number.isFinite(loss), "the next step runs");
  assert.deepEqual(blank.said, []);
});

/** Of the buffers whose label has `failing.label`, those of the turns `failing.turns`, and no others, fail as on a full device. */
function failSome() {
  const { createBuffer, pushErrorScope, popErrorScope } = GPUDevice.prototype;
  const scopes = [];
  let full = false;
  let turn = 0;
  GPUDevice.prototype.createBuffer = function (descriptor) {
    const { label, turns } = globalThis.failing ?? {};
    if (!label || !descriptor.label.includes(label) || !turns.includes(++turn)) return createBuffer.call(this, descriptor);
    full = true;
    // There is nothing behind it either.
    return createBuffer.call(this, { ...descriptor, size: 2 ** 50 });
  };
  GPUDevice.prototype.pushErrorScope = function (filter) {
    scopes.push(filter);
    return pushErrorScope.call(this, filter);
  };
  GPUDevice.prototype.popErrorScope = async function () {
    const fails = scopes.pop() === "out-of-memory" && full;
    if (fails) full = false;
    const error = await popErrorScope.call(this);
    return fails ? new GPUOutOfMemoryError("full") : error;
  };
}

inPage("a device without memory", failSome, async (blank) => {
  const rejection = await blank.evaluate(async () => {
    globalThis.failing = { label: "layer1.weight", turns: [1] };
    const lab = await globalThis.rankmix.Lab.open();
    return globalThis.rejection(() => lab.base(1));
  });
  rejected(rejection, "OutOfMemory", /^the device is out of memory: the parameter `layer1\.weight` needs 262144 bytes$/);
  assert.deepEqual(blank.said, []);
});

inPage("after an allocation that failed late the store has what it had before", failSome, async (blank) => {
  const [first, second, before, after] = await blank.evaluate(() => {
    // Made, made again after the error; in 16 bits, and again after the error.
    globalThis.failing = { label: "`layer.weight`", turns: [1, 3] };
    return globalThis.rankmix.initialized_again();
  });
  for (const message of [first, second]) assert.match(message, /^the device is out of memory: the parameter `layer\.weight`/);
  assert.ok(Number.isFinite(before) && Math.abs(after - before) < 1e-3, `${before}, ${after}`);
  assert.deepEqual(blank.said, []);
});

inPage("a step that an earlier call's late error came before is made once", failSome, async (blank) => {
  const [clean, disturbed] = await blank.evaluate(async () => {
    const clean = await globalThis.rankmix.stepped_again();
    globalThis.failing = { label: "stray", turns: [1] };
    return [clean, await globalThis.rankmix.stepped_again()];
  });
  assert.equal(clean[0], null);
  assert.match(disturbed[0], /^the device is out of memory: the parameter `stray`/);
  assert.deepEqual(disturbed.slice(1), clean.slice(1));
  assert.deepEqual(blank.said, []);
});

inPage("memory is given back at once", () => {
  globalThis.alive = new Set();
  const { createBuffer } = GPUDevice.prototype;
  GPUDevice.prototype.createBuffer = function (descriptor) {
    const buffer = createBuffer.call(this, descriptor);
    globalThis.alive.add(buffer);
    return buffer;
  };
  const { destroy } = GPUBuffer.prototype;
  GPUBuffer.prototype.destroy = function () {
    globalThis.alive.delete(this);
    destroy.call(this);
  };
}, async (blank) => {
  const { used, left } = await blank.evaluate(async (settings) => {
    const { rankmix, alive } = globalThis;
    const lab = await rankmix.Lab.open();
    const base = await lab.base(1);
    const adapter = await lab.adapter(base, settings);
    for (const trainer of [base, adapter]) {
      await trainer.step();
      await trainer.inspect();
    }
    const used = alive.size;
    // The base's weights are the adapter's too.
    base.free();
    await adapter.step();
    adapter.free();
    lab.free();
    return { used, left: [...alive].map(({ label }) => label) };
  }, SETTINGS);
  assert.ok(used > 50, `${used} buffers`);
  assert.deepEqual(left, []);
  assert.deepEqual(blank.said, []);
});

inPage("an internal error of the browser does not bring the package down", () => {
  // As wgpu would be told: the pipeline is invalid, and an internal error is in the scope for those.
  const { createComputePipeline, pushErrorScope, popErrorScope } = GPUDevice.prototype;
  const scopes = [];
  let failed = false;
  let swallow = false;
  GPUDevice.prototype.createComputePipeline = function (descriptor) {
    if (!descriptor.label.startsWith("embedding")) return createComputePipeline.call(this, descriptor);
    failed = swallow = true;
    const compute = { ...descriptor.compute, entryPoint: "missing" };
    return createComputePipeline.call(this, { label: descriptor.label, layout: descriptor.layout, compute });
  };
  GPUDevice.prototype.pushErrorScope = function (filter) {
    scopes.push(filter);
    return pushErrorScope.call(this, filter);
  };
  GPUDevice.prototype.popErrorScope = async function () {
    const filter = scopes.pop();
    const [hidden, internal] = [filter === "validation" && swallow, filter === "internal" && failed];
    if (hidden) swallow = false;
    if (internal) failed = false;
    const error = await popErrorScope.call(this);
    if (hidden) return null;
    return internal ? new GPUInternalError("the compiler gave up") : error;
  };
}, async (blank) => {
  const rejection = await blank.evaluate(async () => {
    const lab = await globalThis.rankmix.Lab.open();
    return globalThis.rejection(async () => (await lab.base(1)).step());
  });
  rejected(rejection, "Gpu", /./);
  assert.deepEqual(blank.said, []);
});

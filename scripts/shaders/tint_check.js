// tint_check.js KERNELS.TSV: every kernel through Tint, the compiler of Chromium's WebGPU, as far as a whole pipeline on Dawn's null device, which
// needs no driver and has the limits that WebGPU guarantees. Tint alone checks that control flow around barriers is uniform.
//
// Prints FILE<TAB>LINE<TAB>ENTRY<TAB>MESSAGE for each failure; LINE is 0 where Tint gives none. The last line is how many kernels were judged.
// A device that is lost accepts everything: then this ends with status 2. TINT_MODULE is the folder of the npm package `webgpu`.
'use strict';
const fs = require('fs');
const path = require('path');
const { create, globals } = require(process.env.TINT_MODULE);
Object.assign(globalThis, globals);

const table = process.argv[2];
const folder = path.dirname(table);
const oneLine = (text) => text.replace(/\s+/g, ' ').trim();

// Kernels by file: entry points with their constants, each once.
const files = new Map();
for (const row of fs.readFileSync(table, 'utf8').split('\n').filter(Boolean)) {
  const [file, entry, constants] = row.split('\t');
  if (!files.has(file)) files.set(file, new Map());
  files.get(file).set(`${entry} ${constants}`, { entry, constants });
}

function fail(file, line, entry, message) {
  console.log([file, line, entry, oneLine(message)].join('\t'));
}

function giveUp(message) {
  console.error(`tint_check.js: ${oneLine(message)}`);
  process.exit(2);
}

async function main() {
  const gpu = create(['backend=null', 'enable-dawn-features=allow_unsafe_apis']);
  const adapter = await gpu.requestAdapter();
  if (!adapter) throw new Error('Dawn has no null adapter');
  const wanted = ['shader-f16', 'subgroups'].filter((feature) => adapter.features.has(feature));
  const device = await adapter.requestDevice({ requiredFeatures: wanted });
  device.lost.then(({ reason, message }) => giveUp(`the device was lost: ${reason}: ${message}`));
  let judged = 0;
  for (const [file, kernels] of files) {
    let code = fs.readFileSync(path.join(folder, file), 'utf8');
    // naga takes built-ins of subgroups without the line that Tint insists on. In front of the first line, so that numbers stay.
    if (/\bsubgroup[A-Z_]/.test(code) && !code.includes('enable subgroups;')) code = `enable subgroups; ${code}`;
    device.pushErrorScope('validation');
    const module = device.createShaderModule({ code });
    const { messages } = await module.getCompilationInfo();
    await device.popErrorScope();
    const errors = messages.filter((message) => message.type === 'error');
    judged += kernels.size;
    for (const error of errors) fail(file, error.lineNum, '', error.message);
    if (errors.length > 0) continue;
    for (const { entry, constants } of kernels.values()) {
      const values = constants.split(' ').filter(Boolean).map((pair) => pair.split('='));
      // Booleans are written as words.
      const number = (value) => (value === 'true' ? 1 : value === 'false' ? 0 : Number(value));
      const compute = { module, entryPoint: entry, constants: Object.fromEntries(values.map(([name, value]) => [name, number(value)])) };
      device.pushErrorScope('validation');
      // Not the asynchronous call: a thread for each of thousands of pipelines brings Dawn down.
      device.createComputePipeline({ layout: 'auto', compute });
      const error = await device.popErrorScope();
      if (error) fail(file, 0, entry, error.message);
    }
  }
  await refusesNonsense(device);
  console.log(judged);
}

// Whether the device still judges, at the end.
async function refusesNonsense(device) {
  device.pushErrorScope('validation');
  const module = device.createShaderModule({ code: '@compute @workgroup_size(1) fn forward() { nonsense(); }' });
  device.createComputePipeline({ layout: 'auto', compute: { module, entryPoint: 'forward' } });
  const { messages } = await module.getCompilationInfo();
  const error = await device.popErrorScope();
  if (!error || messages.length === 0) throw new Error('the device accepts a module that is wrong');
}

main().then(() => process.exit(0), (error) => giveUp(error.message));

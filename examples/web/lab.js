// Opens the device, and says in plain words why it cannot.

/** What keeps the page from working, for a person to read. */
export class Failure extends Error {
  constructor(title, reason, advice) {
    super(title);
    this.reason = reason;
    this.advice = advice;
  }
}

const HOW_TO_GET_WEBGPU = [
  "Chrome and Edge have it on Windows, macOS, ChromeOS and Android: update the browser.",
  "Safari has it from version 26; Firefox has it in its latest releases on Windows and on Macs with Apple's chips.",
  "On Linux, Chrome may want chrome://flags/#enable-unsafe-webgpu, and Firefox dom.webgpu.enabled in about:config.",
];

const HOW_TO_GET_AN_ADAPTER = [
  "Turn on hardware acceleration in the browser's settings, and restart it.",
  "Update the graphics driver. Browsers switch off drivers with known faults: chrome://gpu and about:support say which.",
  "In a virtual machine or over a remote desktop there may be no GPU to offer.",
];

/** What to do after an error of the crate, by its name. */
const AFTER = {
  DeviceLost: ["The GPU was lost while training", "The driver was restarted, or the browser took the GPU away. Try again opens it anew."],
  OutOfMemory: ["The GPU has no memory left", "Fewer experts or a smaller rank need less.", "Close other pages that draw on the GPU."],
  other: ["Training stopped with an error", "Try again begins anew, with a newly opened device."],
};

const messageOf = (error) => (error instanceof Error ? error.message : String(error));

let loading;

/** The WebAssembly package, loaded once: with the network gone, a device can still be opened anew. */
function load() {
  loading ??= (async () => {
    const rankmix = await import("./pkg/rankmix_web.js");
    await rankmix.default();
    return rankmix;
  })();
  return loading;
}

/** Opens a device; throws a Failure. */
export async function openLab() {
  if (typeof WebAssembly !== "object") {
    throw new Failure("This browser does not run WebAssembly", "The model is compiled to WebAssembly.", [
      "If WebAssembly is switched off, by a lockdown mode for instance, allow it for this page.",
    ]);
  }
  if (!globalThis.isSecureContext) {
    throw new Failure("This page was not opened securely", "Browsers give WebGPU to pages over https and from this machine alone.", [
      "Open the page with https://, or at http://localhost or http://127.0.0.1.",
    ]);
  }
  if (!navigator.gpu) {
    throw new Failure("This browser does not offer WebGPU", "The model trains on the GPU, which a page reaches through WebGPU.", HOW_TO_GET_WEBGPU);
  }
  let rankmix;
  try {
    rankmix = await load();
  } catch (error) {
    loading = undefined;
    throw new Failure("The WebAssembly module did not load", messageOf(error), [
      "Reload the page; the connection may have broken off.",
      "If you serve it yourself: scripts/build_web.sh makes pkg/, and .wasm files must be served as application/wasm.",
    ]);
  }
  try {
    return await rankmix.Lab.open();
  } catch (error) {
    throw new Failure("No graphics adapter was opened", messageOf(error), HOW_TO_GET_AN_ADAPTER);
  }
}

const HERE = new URL(".", import.meta.url).href;

/** Whether WebAssembly came to a stop, as it does where Rust panics. */
export const isTrap = (error) => error?.name === "RuntimeError";

/** Whether an error that nobody awaited is the page's own, and not that of an extension of the browser. */
export const isOurs = (error) => isTrap(error) || (error instanceof Error && String(error.stack).includes(HERE));

/** After a fault of the page itself nothing in it can be relied on. */
export function brokenPage(error) {
  return new Failure("The page itself has failed", `${messageOf(error)}. This is a defect; the browser's console may say more.`, [
    "Reload the page to begin anew.",
  ]);
}

/** A failure that came while training. */
export function trainingFailure(error) {
  const [title, ...advice] = AFTER[error?.name] ?? AFTER.other;
  return new Failure(title, messageOf(error), advice);
}

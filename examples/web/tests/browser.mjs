// What the tests share: a server of what was built, and a real browser without a window.
// RANKMIX_BROWSER: chromium or firefox. RANKMIX_WEB_TOOLS: where scripts/test_web.sh puts the packages from npm.
import { accessSync, constants, existsSync, readFileSync } from "node:fs";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { homedir } from "node:os";
import { delimiter, extname, join, normalize } from "node:path";
import { fileURLToPath } from "node:url";

const repository = fileURLToPath(new URL("../../..", import.meta.url));
const cache = process.env.XDG_CACHE_HOME ?? join(homedir(), ".cache");
const tools = process.env.RANKMIX_WEB_TOOLS ?? join(cache, "rankmix-tools", "web-tests");
const packages = createRequire(join(tools, "package.json"));

export const browserName = process.env.RANKMIX_BROWSER ?? "chromium";
/** The folder that scripts/build_web.sh fills. */
export const page = join(repository, "target", "page");
/** The golden cases, served as /golden/NAME. */
export const golden = join(repository, "tests", "golden");
/** The source of axe-core, to be evaluated in a page. */
export const axe = readFileSync(packages.resolve("axe-core/axe.min.js"), "utf8");

const TYPES = {
  ".html": "text/html; charset=utf-8",
  ".css": "text/css; charset=utf-8",
  ".js": "text/javascript; charset=utf-8",
  ".svg": "image/svg+xml",
  ".wasm": "application/wasm",
};
const BLANK = "<!doctype html><html lang=en><title>rankmix</title><link rel=icon href=data:,>";

/** Serves a folder on 127.0.0.1, and beside it /golden/ and an empty page, /blank. */
export async function serve(folder) {
  const server = createServer((request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, "http://localhost").pathname));
    if (path === "/blank") {
      response.setHeader("content-type", TYPES[".html"]);
      response.end(BLANK);
      return;
    }
    const file = path.startsWith("/golden/")
      ? join(golden, path.slice("/golden/".length))
      : join(folder, path === "/" ? "index.html" : path);
    if (!existsSync(file)) {
      response.statusCode = 404;
      response.end();
      return;
    }
    response.setHeader("content-type", TYPES[extname(file)] ?? "application/octet-stream");
    response.end(readFileSync(file));
  });
  await new Promise((listening) => server.listen(0, "127.0.0.1", listening));
  return {
    url: `http://127.0.0.1:${server.address().port}/`,
    close() {
      server.closeAllConnections();
      return new Promise((closed) => server.close(closed));
    },
  };
}

/** The path of a program that PATH leads to. */
function program(name) {
  const found = (process.env.PATH ?? "").split(delimiter).map((folder) => join(folder, name)).find((path) => {
    try {
      accessSync(path, constants.X_OK);
      return true;
    } catch {
      return false;
    }
  });
  if (!found) throw new Error(`there is no ${name} in PATH`);
  return found;
}

/** Chromium by Playwright, on its own software GPU. */
export function launch() {
  return packages("playwright-core").chromium.launch({
    executablePath: program("chromium"),
    headless: true,
    args: [
      "--no-sandbox",
      "--disable-quic",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      "--enable-unsafe-webgpu",
      "--use-webgpu-adapter=swiftshader",
    ],
  });
}

/** Firefox by Puppeteer, on the machine's Vulkan driver. */
function launchFirefox() {
  return packages("puppeteer-core").launch({
    browser: "firefox",
    executablePath: program("firefox-esr"),
    headless: true,
    protocolTimeout: 600_000,
    extraPrefsFirefox: {
      "dom.webgpu.enabled": true,
      "gfx.webgpu.ignore-blocklist": true,
    },
  });
}

/**
 * An empty page of a new browser, in which `lab.init()` has loaded the package: `globalThis.rankmix`. `prepare`, a function or
 * nothing, runs in the page before that. A test of the package needs no more than `evaluate(function, argument)`.
 */
export async function openBlank(prepare) {
  const server = await serve(page);
  const browser = await (browserName === "firefox" ? launchFirefox() : launch());
  const blank = await browser.newPage();
  blank.setDefaultTimeout(0);
  const said = [];
  blank.on("console", (message) => said.push(message.text()));
  blank.on("pageerror", (error) => said.push(String(error)));
  await blank.goto(`${server.url}blank`);
  if (prepare) await blank.evaluate(prepare);
  await blank.evaluate(async () => {
    globalThis.rankmix = await import("/pkg/rankmix_web.js");
    await globalThis.rankmix.default();
    // What a promise was rejected with, or null.
    globalThis.rejection = async (work) => {
      try {
        await work();
        return null;
      } catch (error) {
        return { name: error.name, message: error.message, isError: error instanceof Error };
      }
    };
  });
  return {
    evaluate: (work, argument) => blank.evaluate(work, argument),
    /** What the page wrote to the console, panics among it. */
    said,
    async close() {
      await browser.close();
      await server.close();
    },
  };
}

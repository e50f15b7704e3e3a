// The page's picture for the documents: trains to the end, then saves it.  node examples/web/tests/picture.mjs FILE.png [light|dark|phone]
// Needs what scripts/test_web.sh installs and builds.
import { launch, page as folder, serve } from "./browser.mjs";

const [file, look = "light"] = process.argv.slice(2);
if (!file) {
  console.error("picture.mjs: which file? usage: picture.mjs FILE.png [light|dark|phone]");
  process.exit(2);
}
const looks = {
  light: { viewport: { width: 1280, height: 900 }, colorScheme: "light" },
  dark: { viewport: { width: 1280, height: 900 }, colorScheme: "dark" },
  phone: { viewport: { width: 360, height: 740 }, isMobile: true, hasTouch: true, deviceScaleFactor: 2 },
};

const server = await serve(folder);
const browser = await launch();
try {
  const page = await (await browser.newContext(looks[look])).newPage();
  await page.goto(server.url);
  await page.waitForFunction(() => document.documentElement.dataset.state === "idle");
  await page.click("#run");
  await page.waitForFunction(() => ["done", "failed"].includes(document.documentElement.dataset.state), null, { timeout: 900_000, polling: 500 });
  await page.evaluate(() => document.activeElement.blur());
  await page.waitForTimeout(500);
  await page.screenshot({ path: file, fullPage: true });
  console.log(`${file}: ${await page.textContent("#status")}`);
} finally {
  await browser.close();
  await server.close();
}

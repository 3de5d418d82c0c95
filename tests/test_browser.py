"""The panels in a real browser: JupyterLab on the loopback address, driven by Playwright with Chromium.

Skipped where Playwright or a browser is missing; `.ci/run` installs both. Pictures go to `runs/screenshots`, or to the
folder that MASA_SCREENSHOTS names.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from masa_lib import DATA, config
from masa_lib.lessons.widgets import reward_lab, reward_scenes, training_records
from masa_lib.runs import live_control
from masa_lib.runs.folder import Run, runs_in

ROOT = Path(__file__).resolve().parent.parent
PICTURES = Path(os.environ.get("MASA_SCREENSHOTS", ROOT / "runs" / "screenshots"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed; .ci/run installs it")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; .ci/run installs it")
SECONDS = 120
#: JupyterLab draws all cells, not only those in view, and asks for nothing
USER_SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"}}
PAGE = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}


#: windows in which each notebook has to fit, in pixels
SIZES = ((1366, 768), (1440, 900))
#: What is wrong with the page of a notebook: cut off, broken inside a word, taller than the page, without a label,
#: or a figure's text outside it or upon another.
FAULTS = r"""() => {
  const faults = [], page = document.querySelector(".jp-WindowedPanel-outer").getBoundingClientRect();
  const find = (selector, within = document) => [...within.querySelectorAll(selector)];
  const box = element => element.getBoundingClientRect(), drawn = element => box(element).width > 0;
  const fault = (what, element, said) => faults.push([what, element.closest(".jp-Cell").innerText.slice(0, 40),
                                                      (said ?? element.innerText ?? element.tagName).slice(0, 60)]);
  const outside = ".js-plotly-plot, mjx-container, .cm-editor, script, style";
  for (const output of find(".jp-OutputArea-output, .jp-OutputArea-output *"))
    if (drawn(output) && !output.closest(outside) && output.scrollWidth > output.clientWidth + 1 &&
        output.clientWidth && getComputedStyle(output).display != "inline" &&
        (output.classList.contains("jp-OutputArea-output") || getComputedStyle(output).overflowX != "visible"))
      fault("cut off", output, `${output.scrollWidth} in ${output.clientWidth}: ${output.className}`);
  for (const editor of find(".jp-InputArea .cm-scroller"))
    if (editor.scrollWidth > editor.clientWidth + 1) fault("code cut off", editor, "");
  for (const one of find(".jp-Cell :is(table, img, .js-plotly-plot, button, select, input)"))
    if (drawn(one) && box(one).right > page.right) fault("beyond the page", one);
  for (const text of find(".jp-Cell :is(td, th, label, button, p, li, pre)")) {
    const walk = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) for (const word of walk.currentNode.data.matchAll(/[\p{L}\p{N}_]+/gu)) {
      if (walk.currentNode.parentElement.closest(outside)) continue;
      const range = document.createRange();
      range.setStart(walk.currentNode, word.index);
      range.setEnd(walk.currentNode, word.index + word[0].length);
      if (new Set([...range.getClientRects()].filter(part => part.width).map(part => Math.round(part.top))).size > 1)
        fault("broken word", text, word[0]);
    }
  }
  for (const control of find(".jp-OutputArea-output :is(input, select, textarea, button, [role=slider])"))
    if (drawn(control) && !(control.getAttribute("aria-label") || control.getAttribute("aria-labelledby") ||
        control.title || control.innerText.trim() || [...control.labels ?? []].some(label => label.innerText.trim())))
      fault("no label", control, control.outerHTML);
  for (const figure of find(".jp-Cell .js-plotly-plot")) {
    if (box(figure).height > page.height) fault("taller than the page", figure, String(box(figure).height));
    const texts = find("text", figure).filter(text => text.textContent.trim() && drawn(text) &&
                                                      !text.closest(".hoverlayer, .modebar"));
    texts.forEach((text, place) => {
      const mine = box(text), whole = box(figure);
      if (mine.left < whole.left - 1 || mine.right > whole.right + 1) fault("outside", figure, text.textContent);
      for (const other of texts.slice(place + 1)) {
        const its = box(other);
        if (Math.min(mine.right, its.right) - Math.max(mine.left, its.left) > 3 &&
            Math.min(mine.bottom, its.bottom) - Math.max(mine.top, its.top) > 4)
          fault("upon another", figure, `${text.textContent} / ${other.textContent}`);
      }
    });
  }
  return faults;
}"""


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: where it answers, and the folder that it shows."""

    url: str
    folder: Path


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab over a copy of the notebooks, with settings of its own."""
    folder, own = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("jupyter")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for name, content in USER_SETTINGS.items():
        file = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
    (own / "config" / "labconfig").mkdir(parents=True)
    (own / "config" / "labconfig" / "page_config.json").write_text(json.dumps(PAGE))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "MASA_SMOKE": "1", "OMP_NUM_THREADS": "1", "JUPYTER_CONFIG_DIR": str(own / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"),
        "JUPYTER_RUNTIME_DIR": str(own / "runtime")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True",
               f"--ServerApp.root_dir={folder}"]
    with (own / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api"), "JupyterLab", server, own / "log")
        yield Lab(f"http://127.0.0.1:{port}", folder)
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as reply:
        return reply.status == 200
    return False


def wait_for(condition: Any, what: str, process: subprocess.Popen, log: Path) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit and process.poll() is None, f"{what}: {log.read_text()[-2000:]}"
        time.sleep(0.2)


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1400})
        page.set_default_timeout(SECONDS * 1000)
        playwright.expect.set_options(timeout=SECONDS * 1000)
        yield page
        browser.close()


def cut(lab: Lab, name: str, last: str) -> str:
    """A copy of a notebook that ends with the cell whose source has `last`; its path under the lab's folder."""
    book = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf8"))
    end = next(number for number, cell in enumerate(book["cells"]) if last in "".join(cell["source"]))
    book["cells"] = book["cells"][:end + 1]
    (lab.folder / "notebooks" / f"cut_{name}").write_text(json.dumps(book), encoding="utf8")
    return f"notebooks/cut_{name}"


def command(page: Any, name: str, **arguments: Any) -> None:
    """Give a command to JupyterLab, without waiting for what it does."""
    page.evaluate("([name, more]) => { window.jupyterapp.commands.execute(name, more) }", [name, arguments])


def open_notebook(page: Any, lab: Lab, path: str) -> None:
    page.goto(f"{lab.url}/lab/workspaces/{Path(path).stem}/tree/{path}")  # another workspace brings its open notebooks
    page.wait_for_selector(".jp-Notebook .jp-Cell")
    page.get_by_text("| Idle").wait_for()  # the status bar's word on the kernel; before it, running asks for a kernel


def picture(page: Any, name: str, centre: Any = None) -> None:
    """The page in both themes, with this element in the middle."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for theme, label in (("JupyterLab Dark", "dark"), ("JupyterLab Light", "light")):
        command(page, "apputils:change-theme", theme=theme)
        page.wait_for_selector(f"body[data-jp-theme-name='{theme}']", state="attached")
        page.wait_for_timeout(1000)  # the theme's style sheet is loaded behind it
        if centre:
            centre.evaluate("element => element.scrollIntoView({ block: 'center' })")
        page.screenshot(path=PICTURES / f"{name}_{label}.png")


def state(page: Any, wanted: str, seconds: int = SECONDS) -> None:
    """Wait until the panel says that the run is in this state."""
    said = page.locator("b", has_text=re.compile(f"^{wanted}$"))
    playwright.expect(said).to_be_visible(timeout=seconds * 1000)


def button(page: Any, name: str) -> Any:
    """A button by its text (its accessible name begins with the icon)."""
    return page.locator("button.jupyter-button", has_text=re.compile(rf"^\s*{name}\s*$"))


def press(page: Any, name: str) -> None:
    button(page, name).click()


def turn(page: Any, label: str, times: int) -> float:
    """Move a slider by the keyboard; returns what its readout then says."""
    slider = page.locator(".widget-slider", has_text=label)
    slider.locator(".noUi-handle").focus()
    for _ in range(times):
        page.keyboard.press("ArrowRight")
    return float(slider.locator(".widget-readout").inner_text())


@pytest.mark.slow
def test_a_training_is_steered_from_the_page_and_found_again_after_a_reload(lab: Lab, page: Any) -> None:
    open_notebook(page, lab, cut(lab, "04_train_masa.ipynb", "panel = TrainingPanel"))
    command(page, "notebook:run-all-cells")
    state(page, "new")
    out = Path(page.get_by_role("textbox", name="folder").input_value())
    assert button(page, "start").is_enabled() and not button(page, "pause").is_enabled()
    page.get_by_label("budget, steps").fill("10")
    page.keyboard.press("Tab")
    press(page, "start")
    state(page, "running")
    playwright.expect(page.get_by_text(re.compile("[0-9]+ of (at most )?[0-9,]+ rollouts"))).to_be_visible()
    weight = turn(page, "belief weight", 3)
    assert weight == pytest.approx(1.03)  # 1 and three steps of 0.01
    listed = page.locator("li", has_text=f"prediction.weight = {weight}")
    playwright.expect(listed).to_be_visible()
    change = Run.open(out).changes()[-1]
    assert change["changes"] == {"prediction.weight": pytest.approx(weight)}
    playwright.expect(listed).to_contain_text(f"from step {change['step']}: ")
    press(page, "pause")
    state(page, "paused")
    done = live_control.steps(out)
    press(page, "step")
    playwright.expect(page.get_by_text(f"step {done + 1} of")).to_be_visible()
    state(page, "paused")
    r = training_records.knowledge(training_records.read(out))["r"].iloc[-1]
    playwright.expect(page.locator(".annotation-text", has_text=f"r = {r:.2f}")).to_be_visible()
    button(page, "Why is my reward flat\\?").focus()
    findings = page.get_by_role("status").get_by_text(f"After step {done + 1}")
    page.keyboard.press("Enter")
    playwright.expect(findings).to_be_visible()
    page.keyboard.press("Enter")
    playwright.expect(findings).to_have_count(0)
    page.get_by_label("gate: choose problems").focus()
    page.keyboard.press("Space")
    opened = page.locator("li", has_text="belief.candidates = 1.0")
    press(page, "step")
    playwright.expect(opened).to_be_visible()
    state(page, "paused")
    change = Run.open(out).changes()[-1]
    picture(page, "training_panel")
    press(page, "stop")
    state(page, "stopped")
    command(page, "docmanager:save")
    page.wait_for_timeout(1000)
    page.reload()
    state(page, "stopped")
    press(page, "resume")
    state(page, "finished", 3 * SECONDS)
    run = Run.open(out)
    assert run.status["state"] == "finished" and len(run.metrics()) == run.config.steps
    playwright.expect(page.get_by_text(f"step {run.config.steps} of {run.config.steps}")).to_be_visible()
    assert run.changes()[-1] == change


@pytest.mark.slow
def test_all_of_the_live_notebook_runs_and_the_beliefs_come_to_follow_the_truth(lab: Lab, page: Any) -> None:
    book = json.loads((ROOT / "notebooks" / "04_train_masa.ipynb").read_text(encoding="utf8"))
    for cell in book["cells"]:  # as many steps as it takes, at most what a reader's own run has
        cell["source"] = "".join(cell["source"]).replace("(8, 4) if environment.SMOKE", "(20, 20) if environment.SMOKE")
    (lab.folder / "notebooks" / "live_04.ipynb").write_text(json.dumps(book), encoding="utf8")
    open_notebook(page, lab, "notebooks/live_04.ipynb")
    command(page, "notebook:run-all-cells")
    state(page, "finished", 15 * SECONDS)
    playwright.expect(page.get_by_text("0 of 5 are right").last).to_be_visible()
    out = Path(page.locator(".widget-text", has_text="folder").locator("input").input_value())
    known = training_records.knowledge(training_records.read(out))
    assert known["r"].iloc[0] < 0.3 and known["r"].tail(5).mean() > 0.6
    shown = page.locator(".annotation-text", has_text=f"r = {known['r'].iloc[-1]:.2f}")
    playwright.expect(shown.first).to_be_visible()
    playwright.expect(page.get_by_text("recorded grpo (mean of 8 seeds), as accurate").or_(
        page.get_by_text("Not yet more accurate than at the beginning."))).to_be_visible()
    assert page.locator("[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    picture(page, "live_alignment", shown.first)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb")))
def test_all_of_a_notebook_runs_without_an_error_and_fits_small_windows(
        lab: Lab, page: Any, name: str) -> None:
    page.set_viewport_size(dict(zip(("width", "height"), SIZES[0], strict=True)))
    open_notebook(page, lab, f"notebooks/{name}.ipynb")
    numbered = page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"\[\d+\]:"))
    command(page, "notebook:clear-all-cell-outputs")
    playwright.expect(numbered).to_have_count(0)
    command(page, "notebook:run-all-cells")
    playwright.expect(numbered).to_have_count(
        page.locator(".jp-CodeCell").count(), timeout=5 * SECONDS * 1000)
    for kind in ("error", "stderr"):
        assert page.locator(f"[data-mime-type='application/vnd.jupyter.{kind}']").all_inner_texts() == []
    for width, height in SIZES:
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(2000)  # figures are drawn anew
        assert page.locator("#jp-left-stack").bounding_box()["width"] > 200  # the side bar takes its share
        assert page.evaluate(FAULTS) == [], f"at {width} x {height}"


def numbers(page: Any, recorded: reward_scenes.Recorded, settings: dict[str, Any], group: int) -> tuple[str, list[str]]:
    """Wait until the reward lab shows what these settings pay; returns the mean reward and those of the group."""
    scene = reward_scenes.scene(recorded, settings, reward_scenes.presets(recorded.config)["paper"])
    rows = scene.predictions[scene.predictions["group"] == group]
    mean = f"Mean reward {scene.predictions['reward'].mean():.3f}."
    rewards = [f"{reward:.3f}" for reward in rows["reward"]]
    playwright.expect(page.get_by_text(mean)).to_be_visible()
    for title in (f"Groups without a signal: {scene.no_signal:.0%}", f"Advantages in the group {group}",
                  f"(a constant answer: {scene.hacked:.0%} of the way from random to best)"):
        playwright.expect(page.locator(".annotation-text", has_text=title)).to_be_attached()
    table = page.locator(".widget-html table", has=page.locator("th", has_text="prediction"))
    playwright.expect(table.locator("td:nth-child(3)")).to_have_text(rewards)
    playwright.expect(table.locator("td:nth-child(7)")).to_have_text([f"{value:+.2f}" for value in rows["advantage"]])
    return mean, rewards


def test_the_reward_lab_shows_what_the_settings_in_the_page_pay(lab: Lab, page: Any) -> None:
    open_notebook(page, lab, cut(lab, "02_the_reward_lab.ipynb", "lab = RewardLab"))
    command(page, "notebook:run-all-cells")
    recorded = reward_scenes.read(runs_in(DATA / "runs" / "baseline", "masa-s*"))
    presets, keys = reward_scenes.presets(recorded.config), reward_lab.LABELS
    button(page, "Reset").wait_for()
    group = int(turn(page, "group shown", 2))
    seen = [numbers(page, recorded, presets["ours"], group)]
    settings = dict(presets["ours"])
    for key, times in (("reward.notion_weight", 5), ("reward.length_slack", 3)):
        settings[key] = turn(page, keys[key], times)
        assert settings[key] > presets["ours"][key]
    menu = page.get_by_label(keys["update.normalise_meta"])
    menu.focus()
    page.keyboard.press("ArrowDown")
    settings["update.normalise_meta"] = menu.locator("option:checked").inner_text()
    assert settings["update.normalise_meta"] != presets["ours"]["update.normalise_meta"]
    seen.append(numbers(page, recorded, settings, group))
    picture(page, "reward_lab", page.locator(".js-plotly-plot").last)
    for name, settings in (("hackable", presets["hackable"]), ("Reset", presets["ours"])):
        button(page, name).focus()
        page.keyboard.press("Enter")
        seen.append(numbers(page, recorded, settings, group))
    assert len({mean for mean, _ in seen}) == 3 and seen[0] == seen[-1]


def end(page: Any, label: str, key: str) -> None:
    """Move a slider to its first or last value by the keyboard."""
    page.locator(".widget-slider", has_text=label).locator(".noUi-handle").focus()
    page.keyboard.press(key)


@pytest.mark.slow  # the notebook's cells up to the lab come first
def test_the_tasks_of_the_reward_lab_are_reached_by_keyboard(lab: Lab, page: Any) -> None:
    page.set_viewport_size({"width": 1366, "height": 768})
    open_notebook(page, lab, cut(lab, "02_the_reward_lab.ipynb", "lab = RewardLab"))
    command(page, "notebook:run-all-cells")
    menu, said, names = page.get_by_label("task", exact=True), page.get_by_role("status"), reward_lab.LABELS
    menu.wait_for()

    def begin() -> None:
        menu.focus()
        page.keyboard.press("ArrowDown")
        playwright.expect(said).to_contain_text("Not yet")

    begin()
    for key in ("reward.length_weight", "reward.notion_weight"):
        end(page, names[key], "Home")
    end(page, names["reward.difficulty_base"], "End")
    playwright.expect(said).to_contain_text("Reached: the mean reward")
    begin()
    page.get_by_label(names["update.normalise_meta"]).focus()
    for _ in range(2):  # from reward over parts to none
        page.keyboard.press("ArrowDown")
    playwright.expect(said).to_contain_text("Reached: the pass rate")
    begin()
    end(page, names["reward.pass_rate_weight"], "Home")
    end(page, names["reward.length_slack"], "End")
    page.get_by_label(names["reward.exclude_problem_notions"]).focus()
    page.keyboard.press("Space")
    playwright.expect(said).to_contain_text("Reached: a constant answer")
    picture(page, "reward_lab_task")
    figure = page.locator(".js-plotly-plot").last.bounding_box()
    assert figure["x"] + figure["width"] <= 1366 and figure["height"] <= 560  # whole beside the knobs


@pytest.fixture
def handed() -> Iterator[Path]:
    """The file that "Use in training" writes; what a reader has there is put back."""
    file = reward_lab.SETTINGS_FILE
    kept = file.read_bytes() if file.exists() else None
    file.unlink(missing_ok=True)
    yield file
    file.unlink(missing_ok=True)
    if kept is not None:
        file.write_bytes(kept)


@pytest.mark.slow  # two notebooks in one page: minutes on a busy machine
def test_settings_go_from_the_reward_lab_to_the_training_panel_and_back(lab: Lab, page: Any, handed: Path) -> None:
    open_notebook(page, lab, cut(lab, "02_the_reward_lab.ipynb", "lab = RewardLab"))
    command(page, "notebook:run-all-cells")
    button(page, "Reset").wait_for()
    weight = turn(page, reward_lab.LABELS["reward.notion_weight"], 5)
    for _ in range(60):  # the page shows a turned knob before a busy kernel has heard of it
        press(page, "Use in training")
        page.wait_for_timeout(1000)
        if handed.exists() and config.read(handed).get("reward.notion_weight") == pytest.approx(weight):
            break
    playwright.expect(page.get_by_text("The training panel of notebook 04 begins with it")).to_be_visible()
    assert config.read(handed)["reward.notion_weight"] == pytest.approx(weight)
    open_notebook(page, lab, cut(lab, "04_train_masa.ipynb", "panel = TrainingPanel"))
    command(page, "notebook:run-all-cells")
    state(page, "new")
    said = page.get_by_text("Begins with the settings of runs/reward-lab.toml")
    playwright.expect(said).to_contain_text(f"reward.notion_weight = {weight}")
    playwright.expect(said).to_contain_text("Nothing under the method masa-read")
    page.get_by_label("method", exact=True).select_option("masa")
    playwright.expect(said).not_to_contain_text("Nothing under")
    knob = page.locator(".widget-slider", has_text="notion weight").locator(".widget-readout")
    playwright.expect(knob).to_have_text(f"{weight:.2f}")
    picture(page, "handed_over", said)
    press(page, "without these")
    playwright.expect(said).to_be_hidden()
    playwright.expect(knob).to_have_text("0.25")

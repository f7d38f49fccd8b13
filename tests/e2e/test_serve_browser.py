"""A person tries a model on the page, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.serving.protocol import TensorSpec
from tests.serving import Product, active, running, store_of

playwright = pytest.importorskip("playwright.sync_api")
_BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(_BROWSER is None, reason="no chromium on PATH")
SIDE = 8


class Halves(Product):
    """Says in which half of a picture there is more light."""

    def card(self) -> dict[str, Any]:
        shape = [-1, SIDE * SIDE]
        example = np.zeros((SIDE, SIDE), np.float32)
        example[:, :2] = 16.0
        return {
            **super().card(),
            "labels": ["left", "<b>right</b>"],
            "inputs": [{"name": "input", "datatype": "FP32", "shape": shape}],
            "input_max": 16.0,
            "example": {"input": example.ravel().tolist()},
        }

    def run(self, inputs: Any) -> Any:
        light = inputs["input"].reshape(-1, SIDE, 2, SIDE // 2).sum(axis=(1, 3))
        return {"output": light / 16}


class Tree(Product):
    """Answers with a species and a height."""

    def card(self) -> dict[str, Any]:
        species = {"name": "species", "presents": "label", "labels": ["oak", "<i>ash</i>"]}
        height = {"name": "height", "presents": "values", "labels": []}
        return {**super().card(), "presents": "values", "outputs": [species, height]}

    def run(self, inputs: Any) -> Any:
        rows = len(inputs["input"])
        return {
            "species": np.tile(np.array([1, 2], np.float32), (rows, 1)),
            "height": np.full(rows, 14.5, np.float32),
        }


def opener(store: Path, name: str) -> Product:
    if name == "rows":
        return Product(active(store, name))
    if name == "tree":
        outputs = (TensorSpec("species", "FP32", (-1, 2)), TensorSpec("height", "FP32", (-1,)))
        return Tree(active(store, name), outputs=outputs)
    return Halves(
        active(store, name),
        inputs=(TensorSpec("input", "FP32", (-1, SIDE * SIDE)),),
        outputs=(TensorSpec("output", "FP32", (-1, 2)),),
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = store_of(tmp_path_factory.mktemp("page"), {"halves": 4, "rows": 1, "tree": 2})
    with running(store, opener=opener) as server:
        yield f"http://{server.http}/"


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """The page in a window, which must have nothing to complain about."""
    said: list[str] = []
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=_BROWSER, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": 400, "height": 900})
        window.on("console", lambda message: said.append(message.text))
        window.on("pageerror", lambda error: said.append(str(error)))
        window.on("request", lambda request: said.extend(elsewhere(request.url, address)))
        window.goto(address)
        window.wait_for_selector("#model option", state="attached")
        yield window
        browser.close()
    # Chromium says of itself that an answer was a refusal; that the page must tell, too.
    assert [line for line in said if "status of 400" not in line] == []


def elsewhere(url: str, address: str) -> list[str]:
    return [] if url.startswith(address) else [url]


def test_a_person_draws_and_gets_an_answer(page: Any, tmp_path: Path) -> None:
    box = page.locator("#canvas").bounding_box()
    x, y = box["x"] + 200, box["y"] + 40
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 200, steps=4)
    page.mouse.up()
    page.wait_for_selector("#bars li")
    assert "Version 4" in page.inner_text("#took")
    page.screenshot(path=str(tmp_path / "page.png"))
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_example_goes_out_as_it_is_and_labels_are_text(page: Any) -> None:
    page.click("#example")
    page.wait_for_selector("#bars li")
    assert page.inner_text("#answer") == "left"
    assert "<b>right</b>" in page.inner_text("#bars")


def test_each_of_several_outputs_is_told_by_its_name(page: Any) -> None:
    page.select_option("#model", "tree")
    page.fill("#text", "1, 2, 3, 4, 5, 6")
    page.click("#ask")
    page.wait_for_function("document.querySelector('#answer').textContent.includes('height')")
    assert page.inner_text("#answer") == "species: <i>ash</i>; height: 14.5"


def test_a_row_is_pasted_and_a_wrong_one_is_told(page: Any) -> None:
    page.select_option("#model", "rows")
    page.fill("#text", "1, 2, 3, 4, 5, 6")
    page.click("#ask")
    page.wait_for_selector("#bars li")
    page.fill("#text", "1, 2")
    page.click("#ask")
    page.wait_for_selector("#answer.wrong")
    assert "takes 6 elements, got 2" in page.inner_text("#answer")
    page.fill("#text", "one")
    page.click("#ask")
    page.wait_for_function("document.querySelector('#answer').textContent.includes('JSON')")

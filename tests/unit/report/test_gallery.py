from __future__ import annotations

import re

import pytest
from tiny_models import save_image

from fedml_plugin_fedmosaic.core.errors import DataError
from fedml_plugin_fedmosaic.data.base import ClientData, FederatedData, Sample, TaskSpec
from fedml_plugin_fedmosaic.report.gallery import write_gallery


@pytest.fixture
def data(tmp_path) -> FederatedData:
    picture = tmp_path / "p.png"
    save_image(picture, "red")
    pets = TaskSpec(dataset="Pets", subset_id=0, kind="multi-choice")
    sums = TaskSpec(dataset="Sums", subset_id=1, kind="open-ended", metric="F1")
    dummy = TaskSpec(dataset="dummy", subset_id=0)

    def sample(task: TaskSpec, number: int) -> Sample:
        if task is pets:
            turns = (f"<image>\nWhich <b>{number}</b>? Choice list:[cat, dog].", "dog")
            return Sample(sample_id=f"{number}", task=task.name, turns=turns, images=(picture,))
        return Sample(sample_id=f"{number}", task=task.name, turns=("1 + 2 ?", "3"))

    rows = {task.name: tuple(sample(task, k) for k in range(4)) for task in (pets, sums)}
    return FederatedData(
        name="tiny & small",
        clients=(
            ClientData(client_id=0, model_id="small", tasks=(pets, sums),
                       train=(rows["Pets-0"], rows["Sums-1"])),
            ClientData(client_id=1, model_id="large", tasks=(pets, dummy),
                       train=(rows["Pets-0"], ())),
        ),
        test=rows,
        tasks={task.name: task for task in (pets, sums)},
    )  # fmt: skip


def test_every_client_and_task_is_shown_with_the_right_answer_marked(data, tmp_path):
    page = write_gallery(tmp_path / "out/data.html", data, num_samples=2).read_text()
    assert page.count('<section id="client-') == 2
    assert page.count('<article class="task"') == 4
    assert page.count('<div class="sample">') == 6
    assert page.count('<li class="right">dog</li>') == 4
    assert page.count('<div class="answer">3</div>') == 2
    assert page.count('src="data:image/jpeg;base64,') == 4
    assert "also of client 1" in page
    assert "No data in this slot." in page
    # Texts are data, not markup; marks and the choice list are not repeated.
    assert "&lt;b&gt;" in page
    assert "tiny &amp; small" in page
    assert "Choice list" not in page
    # Self-contained.
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)


def test_the_page_is_the_same_every_time(data, tmp_path):
    first = write_gallery(tmp_path / "a.html", data).read_bytes()
    assert write_gallery(tmp_path / "b.html", data).read_bytes() == first


def test_an_image_that_is_gone_is_named(data, tmp_path):
    (tmp_path / "p.png").unlink()
    with pytest.raises(DataError, match=r"p\.png cannot be shown") as caught:
        write_gallery(tmp_path / "data.html", data)
    assert "fedmosaic data verify" in str(caught.value.hint)

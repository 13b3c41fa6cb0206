"""Pictures through the server: those of job=render, and mistakes refused in the form of all others."""

import base64
import io

import numpy as np
import openai
import pytest
from PIL import Image

from framework.engine.request import Load, Orders
from framework.families.calls import CALLS
from framework.jobs.common import open_checked
from framework.jobs.drawing import ENCODERS, LOADER
from framework.jobs.serve import DRAWER
from framework.planning.make import make_plan
from framework.recipe.compose import compose
from framework.serving.pictures import Drawn, Picture, PictureModel, PictureSession, pictures_of
from framework.serving.protocol import ApiError, read_pictures
from tests.diffusion.made import wan_pipeline
from tests.serving.running import serving

SEED, STEPS, GUIDANCE = 11, 6, 2.0
ASKED = {"model": "digits", "prompt": "3", "extra_body": {"seed": SEED}}


@pytest.fixture(scope="module")
def server():
    settings = ("runtime.dtype=float32", f"job.steps={STEPS}", f"job.guidance={GUIDANCE}", "job.max_queue=3")
    with serving(*settings, recipe="diffusion/digits", model=None) as running:
        yield running


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))))


@pytest.mark.slow
@pytest.mark.ray
def test_pictures_are_those_of_render(server, warm_session):
    plan = make_plan(open_checked(compose(["recipe=diffusion/digits", "runtime.dtype=float32"])), "cpu")
    warm_session.load(plan, loader=LOADER)
    settings = {"class_labels": [3], "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    rendered = [
        next(e["frames"][0] for e in warm_session.stream("render", [(settings, SEED + i)]) if "frames" in e)
        for i in range(2)
    ]
    with server.client() as client:
        made = client.images.generate(**ASKED, n=2, response_format="b64_json")
        assert [pixels(data).tolist() for data in made.data] == [np.asarray(each).tolist() for each in rendered]
        # what a request says goes before what the job says
        other = client.images.generate(**ASKED | {"extra_body": {"seed": SEED, "steps": 2}})
        assert pixels(other.data[0]).tolist() != np.asarray(rendered[0]).tolist()
        assert client.models.list().data[0].id == "digits"
    assert server.figures()["pictures_total"] == 3
    assert server.figures()['requests_running{replica="0"}'] == 0


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"prompt": "a cat"}, 400, "prompt"),
        ({"prompt": "10"}, 400, "prompt"),
        ({"prompt": 3}, 400, "prompt"),
        ({"model": "other"}, 404, "model"),
        ({"n": 11}, 400, "n"),
        ({"n": 5}, 400, "n"),  # more than run and wait
        ({"size": "big"}, 400, "size"),
        ({"size": "9999x9999"}, 400, "size"),
        ({"size": "32x32"}, 400, None),  # this pipeline has one size
        ({"response_format": "url"}, 400, "response_format"),
        ({"extra_body": {"negative_prompt": "4"}}, 400, None),
        ({"extra_body": {"step": 4}}, 400, "step"),
    ],
)
def test_mistakes_are_refused_in_openais_form(server, change, status, param):
    with server.client() as client, pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(**ASKED | change)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.slow
@pytest.mark.ray
def test_a_server_of_pictures_has_no_texts(server):
    with server.client() as client, pytest.raises(openai.NotFoundError):
        client.completions.create(model="digits", prompt="3")
    assert server.get("/health")[0] == 200


@pytest.mark.slow
@pytest.mark.ray
def test_a_prompt_is_drawn_as_render_draws_it(warm_session, tmp_path):
    given = [f'model.path="{wan_pipeline(tmp_path / "wan")}"', "model.kind=diffusion", "job=plan",
             "runtime.dtype=float32", "parallel.tp_size=2"]  # fmt: skip
    plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
    text = {"prompt": "abc", "negative_prompt": "b", "max_sequence_length": 16}
    settings = {"height": 32, "width": 48, "num_frames": 1, "num_inference_steps": 2, "max_sequence_length": 16}
    warm_session.load(plan, loader=ENCODERS)
    embedded = warm_session.call("encode", [text])[0][0]
    warm_session.load(plan, loader=LOADER)
    expected = list(warm_session.stream("render", [({**settings, **embedded}, SEED)]))[-1]["frames"][0]
    warm_session.load(plan, loader=DRAWER)
    session = PictureSession(warm_session, copies=1)
    session.tell("post", Orders((Picture(0, {**settings, **text}, SEED),)))
    events = session.stream("serve")
    next(events)
    (drawn, _) = next(events)
    events.close()
    assert np.asarray(Image.open(io.BytesIO(drawn.png))).tolist() == np.asarray(expected).tolist()
    assert len(np.unique(np.asarray(expected))) > 10  # a picture


class Drawers:
    """Ranks that draw grey squares, two at a time."""

    def __init__(self):
        self.drawn, self.calls = [], []

    def stream(self, method, outputs):
        assert method == "render"
        self.drawn.append(outputs)
        yield {"step": 1, "steps": 1}
        for _, seed in outputs:
            yield {"frames": np.full((1, 2, 2, 3), seed, np.uint8)}

    def call(self, method, *args):
        self.calls.append((method, *args))
        return [[{"prompt_embeds": "e"}]] if method == "encode" else [0]


def test_what_waits_is_drawn_by_all_copies_and_what_was_given_up_is_not():
    drawers = Drawers()
    session = PictureSession(drawers, copies=2)
    session.tell("post", Orders(tuple(Picture(i, {"prompt": "x", "height": 2}, i) for i in range(5))))
    session.tell("post", Orders(cancelled=(1, 4)))
    events = session.stream("serve")
    assert next(events) == [Load(2, 1, 0)]
    found = [event for _ in range(3) for event in next(events)]
    session.tell("end")
    found += [event for rest in events for event in rest]
    assert [event.index for event in found if isinstance(event, Drawn)] == [0, 2, 3]
    assert [event for event in found if isinstance(event, Load)][-1] == Load(0, 0, 0)
    assert [[seed for _, seed in outputs] for outputs in drawers.drawn] == [[0, 2], [3]]
    assert drawers.drawn[0][0][0] == {"height": 2, "prompt_embeds": "e"}
    assert drawers.calls[0] == ("encode", [{"prompt": "x"}])


def test_classes_have_numbers_and_names():
    names = {0: "tench, Tinca tinca", 1: "goldfish"}
    model = PictureModel("m", lambda words: {"steps": words["labels"]}, names, 100)

    def label(prompt):
        (picture,) = pictures_of(read_pictures({"prompt": prompt}), model)
        return picture.arguments["class_labels"]

    assert [label(prompt) for prompt in ("1", " Goldfish", "tinca tinca", "0")] == [[1], [1], [0], [0]]
    with pytest.raises(ApiError):
        label("2")


def test_every_pipeline_that_takes_prompts_takes_a_size():
    assert all(
        {"prompts", "height", "width"} <= set(call.words) for call in CALLS.values() if "labels" not in call.words
    )

"""The picture of coalitions: every device once, where it stands, with its coalition's round."""

import dataclasses
from xml.etree import ElementTree

import pytest

import crowdmesh_jax as cm
from crowdmesh_jax.core import CoalitionStructure
from crowdmesh_jax.errors import InvalidCoalitionError
from crowdmesh_jax.report.mapped import MAP, WIDTH, draw_coalitions

SVG = "{http://www.w3.org/2000/svg}"


def drawn(crowd, structure, rounds_s, **more):
    root = ElementTree.fromstring(draw_coalitions(crowd, structure, rounds_s, **more))
    dots = {}
    for circle in root.iter(f"{SVG}circle"):
        tip = circle.find(f"{SVG}title")
        if tip is not None:
            name, words = tip.text.split(": ")
            assert name not in dots
            dots[name] = (circle, words)
    return root, dots


def structure_of(crowd, size=3):
    ids = [device.id for device in crowd.devices]
    return CoalitionStructure.of([ids[start : start + size] for start in range(0, len(ids), size)])


@pytest.mark.parametrize("name", list(cm.crowds.PRESETS))
def test_every_device_is_a_dot_of_its_coalitions_colour_inside_the_picture(name):
    crowd = cm.crowds.preset(name, 20, seed=1)
    structure = structure_of(crowd)
    rounds_s = [1.0 + index for index in range(len(structure))]
    root, dots = drawn(crowd, structure, rounds_s)
    assert sorted(dots) == sorted(device.id for device in crowd.devices)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == WIDTH + 24
    colours = {}
    for device, (circle, _) in dots.items():
        radius = float(circle.get("r"))
        assert radius <= float(circle.get("cx")) <= MAP - radius
        assert radius <= float(circle.get("cy")) <= height - 50
        colours.setdefault(structure.coalition_of(device), set()).add(circle.get("fill"))
    assert all(len(each) == 1 for each in colours.values())
    assert len(set.union(*colours.values())) == len(structure)


def test_numbers_go_by_the_round_and_the_legend_names_it():
    crowd = cm.crowds.campus(6, seed=0)
    structure = structure_of(crowd, 2)
    root, dots = drawn(crowd, structure, [2.0, 30.0, 0.5])
    slowest = structure.coalitions[1]
    assert all(dots[device][1] == "coalition 1, round 30.0 s" for device in slowest)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "30.0 s, 2 devices" in texts
    assert "500 ms, 2 devices" in texts
    assert texts.count("1") == 3, "two dots and a line of the legend"
    assert any("3 coalitions of 6 devices; the slowest round takes 30.0 s" in t for t in texts)
    assert any(" from left to right, " in text for text in texts)
    named, _ = drawn(crowd, structure, [2.0, 30.0, 0.5], title="a & b")
    assert named.find(f"{SVG}title").text == "a & b"


def test_places_are_to_scale_and_north_is_up():
    devices = [
        dataclasses.replace(device, position_m=place)
        for device, place in zip(
            cm.crowds.campus(3, seed=0).devices,
            ((0.0, 0.0), (100.0, 0.0), (0.0, 60.0)),
            strict=True,
        )
    ]
    crowd = cm.Crowd(devices=tuple(devices))
    _, dots = drawn(crowd, structure_of(crowd, 3), [1.0])
    at = [
        (float(dots[device.id][0].get("cx")), float(dots[device.id][0].get("cy")))
        for device in devices
    ]
    assert at[1][1] == at[0][1]
    assert at[1][0] > at[0][0]
    assert at[2][1] < at[0][1]
    across, up = at[1][0] - at[0][0], at[0][1] - at[2][1]
    assert up / across == pytest.approx(0.6, rel=0.01)


def test_devices_without_a_position_stand_below_and_it_is_said():
    crowd = cm.crowds.campus(8, seed=0)
    lost = {device.id for device in crowd.devices[:3]}
    devices = tuple(
        dataclasses.replace(device, position_m=None) if device.id in lost else device
        for device in crowd.devices
    )
    crowd = cm.Crowd(devices=devices)
    root, dots = drawn(crowd, structure_of(crowd), [1.0, 2.0, 3.0])
    lowest = max(float(dots[d.id][0].get("cy")) for d in devices if d.id not in lost)
    assert all(float(dots[device][0].get("cy")) > lowest for device in lost)
    texts = " ".join(element.text or "" for element in root.iter(f"{SVG}text"))
    assert "3 devices without a position stand below" in texts
    nowhere = cm.Crowd.local((1.0, 0.5))
    root, dots = drawn(nowhere, structure_of(nowhere, 1), [1.0, 2.0])
    assert len(dots) == 2
    assert "no device has a position" in [element.text for element in root.iter(f"{SVG}text")]


def test_many_coalitions_are_summed_up_and_a_foreign_structure_refused():
    crowd = cm.crowds.campus(200, seed=0)
    structure = structure_of(crowd)
    root, dots = drawn(crowd, structure, [100.0 - i for i in range(len(structure))])
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert f"{len(structure) - 30} more, 70.0 s or less" in texts
    assert len(dots) == 200
    assert len(texts) < 70, "no numbers inside small dots"
    with pytest.raises(InvalidCoalitionError, match="is not in the crowd"):
        draw_coalitions(cm.Crowd.local((1.0,)), structure, [1.0] * len(structure))

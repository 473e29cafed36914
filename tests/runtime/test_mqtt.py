"""Lines reach a real broker, which may go away and come back, refuse, or not be there."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines import Made
from tests.test_cli_run import SMALL, start
from vitedge.errors import VitEdgeError
from vitedge.runtime import mqtt
from vitedge.runtime.mqtt import WAITING, MqttTopic

paho = pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")


class Broker:
    """Mosquitto on a port of its own, and all that was published to it."""

    def __init__(self, folder: Path, *settings: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._config = folder / "mosquitto.conf"
        self._config.write_text("\n".join((f"listener {self.port} 127.0.0.1", "log_type none", *settings)))
        self._process: subprocess.Popen[bytes] | None = None
        self.heard: list[str] = []
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen([str(MOSQUITTO), "-c", str(self._config)])
        until(lambda: connects(self.port))

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(10)

    def listen(self) -> None:
        """Subscribe to everything, again whenever it was away."""
        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.reconnect_delay_set(1, 1)
        subscribed: list[int] = []
        client.on_connect = lambda client, *_: client.subscribe("#", qos=1)
        client.on_subscribe = lambda *_: subscribed.append(1)
        client.on_message = lambda _, __, message: self.heard.append(f"{message.topic} {message.payload.decode()}")
        client.connect("127.0.0.1", self.port)
        client.loop_start()
        until(lambda: bool(subscribed))
        self.subscriber = client


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    if not MOSQUITTO:
        pytest.skip("mosquitto is not installed")
    opened = Broker(tmp_path, "allow_anonymous true")
    yield opened
    opened.stop()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def test_lines_are_published_in_order_and_all_before_it_closes(broker: Broker) -> None:
    broker.listen()
    said: list[str] = []
    topic = MqttTopic(f"mqtt://127.0.0.1:{broker.port}/home/front%20door", said.append)
    for index in range(50):
        topic.send(str(index))
    topic.close()
    topic.close()
    until(lambda: len(broker.heard) >= 50)
    assert broker.heard == [f"home/front door {index}" for index in range(50)]
    assert (said, topic.lost) == ([], 0)


def test_a_broker_that_goes_away_is_found_again_and_memory_is_bounded(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "LONGEST_WAIT_S", 1)
    said: list[str] = []
    topic = MqttTopic(f"mqtt://127.0.0.1:{broker.port}/t", said.append)
    broker.stop()
    until(lambda: len(said) == 1)
    for index in range(1000):
        topic.send(str(index))
    assert topic.lost >= 1000 - 2 * WAITING
    broker.start()
    broker.listen()
    until(lambda: len(said) == 2)
    topic.send("again")
    until(lambda: "t again" in broker.heard)
    topic.close()
    assert said == ["the broker 127.0.0.1 is lost, and is tried again", "the broker 127.0.0.1 is back"]


def test_mistakes_are_sentences_without_the_password(broker: Broker, tmp_path: Path) -> None:
    secret = "hunter2"
    for address, sentence in (
        ("http://127.0.0.1/t", "no broker and topic"),
        (f"mqtt://me:{secret}@127.0.0.1", "no broker and topic"),
        ("mqtt://127.0.0.1/all/#", "no broker and topic"),
        ("mqtt://127.0.0.1:99999/t", "no broker and topic"),
        (f"mqtt://me:{secret}/1@127.0.0.1/t", "no broker and topic"),
        ("mqtt://[::1/t", "no broker and topic"),
        (f"mqtt://me:{secret}@127.0.0.1:1/t", "cannot be reached on port 1"),
        (f"mqtt://me:{secret}@no.such.host.invalid/t", "cannot be reached"),
    ):
        with pytest.raises(VitEdgeError, match=sentence) as caught:
            MqttTopic(address, lambda _: None)
        assert caught.value.hint and secret not in str(caught.value)
    (tmp_path / "closed").mkdir()
    closed = Broker(tmp_path / "closed", "allow_anonymous false")
    with pytest.raises(VitEdgeError, match=r"refuses: Not authori[sz]ed"):
        MqttTopic(f"mqtt://me:{secret}@127.0.0.1:{closed.port}/t", lambda _: None)
    closed.stop()


def test_a_run_publishes_what_it_prints(made: Made, broker: Broker) -> None:
    broker.listen()
    process = start(
        made, "--source", "synthetic", *SMALL, "--limit", 10, "--json", "--mqtt", f"mqtt://127.0.0.1:{broker.port}/camera"
    )
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    until(lambda: len(broker.heard) >= 10)
    assert [line.removeprefix("camera ") for line in broker.heard] == out.splitlines()
    assert [json.loads(line)["source"] for line in out.splitlines()] == ["synthetic"] * 10

"""Lines in, messages of an MQTT broker out: mqtt://user:password@host:1883/topic, or mqtts:// with TLS.

Knows nothing of cameras or engines; paho-mqtt is loaded only here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from vitedge.errors import MissingPackageError, VitEdgeError

PORTS = {"mqtt": 1883, "mqtts": 8883}
WAITING = 64  # messages that the broker has not confirmed; beyond that new ones are lost
LONGEST_WAIT_S = 10  # before a broker that was lost is tried again
LAST_MESSAGES_S = 2.0
FORM = "mqtt://HOST/TOPIC, mqtt://USER:PASSWORD@HOST:PORT/TOPIC, or mqtts:// with TLS"


class MqttTopic:
    """A topic that each line is published to, at least once (QoS 1), without waiting for the broker.

    The connection is made on opening, so that a mistake shows there, and made again when it is lost, for ever. lost: lines for
    which too many waited. say: is told that the broker is lost and that it is back. Raises VitEdgeError where the broker
    cannot be reached or refuses, and MissingPackageError without paho-mqtt.
    """

    def __init__(self, address: str, say: Callable[[str], None]) -> None:
        parts, host, port, self._topic = _read(address)
        self.lost = 0
        self._broker, self._say = f"the broker {host}", say
        self._last: Any = None
        self._refused, self._away = "", False
        self._paho = _load_paho()
        self._client = self._paho.Client(self._paho.CallbackAPIVersion.VERSION2)
        self._client.max_queued_messages_set(WAITING)
        self._client.reconnect_delay_set(1, LONGEST_WAIT_S)
        self._client.on_connect, self._client.on_disconnect = self._connected, self._disconnected
        if parts.username:
            self._client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        if parts.scheme == "mqtts":
            self._client.tls_set()
        self._connect(host, port)

    def send(self, line: str) -> None:
        """Publish a line."""
        sent = self._client.publish(self._topic, line, qos=1)
        if sent.rc == self._paho.MQTT_ERR_QUEUE_SIZE:
            self.lost += 1
        else:
            self._last = sent

    def close(self) -> None:
        """Give the broker a moment for the last lines, and leave; calling it twice is safe."""
        self._away = True  # nobody is to be told any more
        if self._last is not None and self._client.is_connected():
            self._last.wait_for_publish(LAST_MESSAGES_S)
        self._client.disconnect()
        self._client.loop_stop()

    def _connect(self, host: str, port: int) -> None:
        try:
            self._client.connect(host, port)
        except (OSError, ValueError) as error:
            raise VitEdgeError(f"{self._broker} cannot be reached on port {port}: {error}", hint="is it running?") from error
        while not self._client.is_connected() and not self._refused:  # until it has answered
            if self._client.loop(1.0) != self._paho.MQTT_ERR_SUCCESS and not self._refused:
                self._refused = "it closed the connection"
        if self._refused:
            raise VitEdgeError(f"{self._broker} refuses: {self._refused}", hint=f"give {FORM}")
        self._client.loop_start()

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._refused = str(reason)
        elif self._away:
            self._away = False
            self._say(f"{self._broker} is back")

    def _disconnected(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if not self._away and not self._refused:
            self._away = True
            self._say(f"{self._broker} is lost, and is tried again")


def _read(address: str) -> tuple[SplitResult, str, int, str]:
    """The parts of an address, with its host, port and topic. What is wrong with it is not quoted: it may hold a password."""
    try:
        parts = urlsplit(address)
        host, topic = parts.hostname, unquote(parts.path.lstrip("/"))
        plain = not set("#+?") & set(address.rpartition("@")[2])  # the first two are for who subscribes
        if parts.scheme in PORTS and host and topic and plain:
            return parts, host, parts.port or PORTS[parts.scheme], topic
    except ValueError:  # a port that is none, or half an IPv6 address
        pass
    raise VitEdgeError("no broker and topic can be read off the address of --mqtt", hint=f"give {FORM}")


def _load_paho() -> ModuleType:
    try:
        return importlib.import_module("paho.mqtt.client")
    except ImportError as error:
        raise MissingPackageError("paho-mqtt", "mqtt") from error

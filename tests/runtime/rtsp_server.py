"""An RTSP server of GStreamer's, to be run by the system's Python, which has its bindings: rtsp_server.py PORT CLIP.mp4

Serves the video of the file at rtsp://127.0.0.1:PORT/clip as it is, H.264 or MPEG-4, at its own rate.
"""

import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

PAYLOADERS = {"h264": "h264parse ! rtph264pay config-interval=-1", "mpeg4": "mpeg4videoparse ! rtpmp4vpay"}


def serve(port: str, clip: str, codec: str) -> None:
    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
    factory = GstRtspServer.RTSPMediaFactory(shared=True)
    factory.set_launch(f'( filesrc location="{clip}" ! qtdemux ! {PAYLOADERS[codec]} name=pay0 pt=96 )')
    server.get_mount_points().add_factory("/clip", factory)
    if not server.attach(None):
        sys.exit(f"port {port} is in use")
    GLib.MainLoop().run()


serve(*sys.argv[1:])

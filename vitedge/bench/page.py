"""Sections of HTML in, one self-contained page out: its own styles and script, nothing from outside, light and dark.

Knows nothing of what the sections say. Its policy lets no other style, script or address in: whatever slipped into the text
would not run.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape
from pathlib import Path

FOLDER = Path(__file__).with_name("report_page")
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><b>vitedge</b><span>{about}</span></header>
<main>{body}</main>
<script>{script}</script>
</body>
</html>
"""


def page(title: str, about: str, body: str) -> str:
    """The whole file. title, about: text; body: HTML."""
    style, script = ((FOLDER / name).read_text("utf-8") for name in ("style.css", "page.js"))
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}"
    return PAGE.format(policy=policy, title=escape(title), style=style, about=escape(about), body=body, script=script)


def _hash(text: str) -> str:
    """What a Content-Security-Policy calls an inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

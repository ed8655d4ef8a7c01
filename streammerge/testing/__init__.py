"""For your own tests and CI: a Hugging Face Hub on the loopback interface. Needs the standard library only.

from streammerge.testing import Fault, Hub

with Hub() as hub:
    hub.add("org/base", folder)
    hub.misbehave(Fault("reset", path="*/model.safetensors", nbytes=1000))
"""

from streammerge.testing.faults import Armed, Fault
from streammerge.testing.loopback_hub import Hub
from streammerge.testing.record import Exchange, Traffic
from streammerge.testing.repository import Commit, Discussion, Repository
from streammerge.testing.store import File
from streammerge.testing.wire import User

__all__ = ["Armed", "Commit", "Discussion", "Exchange", "Fault", "File", "Hub", "Repository", "Traffic", "User"]

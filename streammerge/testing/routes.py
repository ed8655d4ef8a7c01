"""Which function answers which request."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from streammerge.testing import cas, changes, discussions, files, listings, uploads
from streammerge.testing.state import State
from streammerge.testing.wire import Reply, Request

Answer = Callable[[State, Request], Reply]

NAME = r"([^/]+/[^/]+)"
REVISION = r"(refs/(?:heads|pr|convert)/[^/]+|[^/]+)"  # the client sends refs%2Fpr%2F1, others may not
HASH = "([0-9a-f]{64})"
MODEL = rf"/api/models/{NAME}"


@dataclass(frozen=True)
class Route:
    """A pattern of the undecoded path, and who answers.

    Attributes:
        endpoint: its name in the record.
        streams: whether the request's body may be large: it is then read while it is being handled.
    """

    host: str
    methods: str
    pattern: str
    endpoint: str
    answer: Answer
    streams: bool = False


ROUTES = (
    Route("hub", "GET", "/api/agent-harnesses", "agent-harnesses", listings.agent_harnesses),
    Route("hub", "GET", "/api/whoami-v2", "whoami", listings.whoami),
    Route("hub", "POST", "/api/repos/create", "create-repository", changes.create_repository),
    Route("hub", "DELETE", "/api/repos/delete", "delete-repository", changes.delete_repository),
    Route("hub", "POST", "/api/validate-yaml", "validate-yaml", changes.validate_yaml),
    Route("hub", "GET", rf"{MODEL}(?:/revision/{REVISION})?", "info", listings.info),
    Route("hub", "GET", rf"{MODEL}/refs", "refs", listings.refs),
    Route("hub", "GET", rf"{MODEL}/commits/{REVISION}", "commits", listings.commits),
    Route("hub", "GET", rf"{MODEL}/tree/{REVISION}(?:/(.*))?", "tree", listings.tree),
    Route("hub", "POST", rf"{MODEL}/paths-info/{REVISION}", "paths-info", listings.paths_info),
    Route("hub", "GET", rf"{MODEL}/auth-check(/write)?", "auth-check", changes.auth_check),
    Route("hub", "PUT", rf"{MODEL}/settings", "settings", changes.settings),
    Route("hub", "POST", rf"{MODEL}/branch/(.+)", "create-branch", changes.create_branch),
    Route("hub", "DELETE", rf"{MODEL}/branch/(.+)", "delete-branch", changes.delete_branch),
    Route("hub", "POST", rf"{MODEL}/tag/{REVISION}", "create-tag", changes.create_tag),
    Route("hub", "DELETE", rf"{MODEL}/tag/(.+)", "delete-tag", changes.delete_tag),
    Route("hub", "POST", rf"{MODEL}/preupload/{REVISION}", "preupload", changes.preupload),
    Route("hub", "POST", rf"{MODEL}/commit/{REVISION}", "commit", changes.commit),
    Route("hub", "POST", rf"{MODEL}/discussions", "create-discussion", discussions.create),
    Route("hub", "GET", rf"{MODEL}/discussions", "discussions", discussions.listing),
    Route("hub", "GET", rf"{MODEL}/discussions/(\d+)", "discussion", discussions.details),
    Route("hub", "POST", rf"{MODEL}/discussions/(\d+)/merge", "merge", discussions.merge),
    Route("hub", "POST", rf"{MODEL}/discussions/(\d+)/status", "discussion-status", discussions.status),
    Route("hub", "POST", rf"/{NAME}\.git/info/lfs/objects/batch", "lfs-batch", uploads.batch),
    Route("hub", "POST", rf"/api/complete/{NAME}", "lfs-complete", uploads.complete, streams=True),
    Route("hub", "POST", rf"/api/complete/{NAME}/verify", "lfs-verify", uploads.verify),
    Route("hub", "GET", rf"{MODEL}/xet-read-token/{REVISION}", "xet-token", cas.read_token),
    Route("hub", "GET", rf"{MODEL}/xet-write-token/{REVISION}", "xet-token", cas.write_token),
    Route("storage", "POST", rf"/cas/v1/xorbs/default/{HASH}", "xorb-upload", cas.put_xorb, streams=True),
    Route("storage", "POST", "/cas/v[12]/shards", "shard-upload", cas.put_shard),
    Route("storage", "GET", rf"/cas/v1/reconstructions/{HASH}", "reconstruction", cas.reconstruction),
    Route("storage", "GET", rf"/cas/v1/chunks/[^/]+/{HASH}", "deduplication", cas.absent),
    Route("storage", "POST", rf"/cas/v1/xorb-grants/[^/]+/{HASH}", "xorb-grant", cas.absent),
    Route("storage", "GET", rf"/cas/v2/reconstructions/{HASH}", "reconstruction", cas.absent),
    Route("storage", "GET", rf"/xorbs/{HASH}", "xorb-download", cas.get_xorb),
    Route("hub", "GET HEAD", rf"/{NAME}/resolve/{REVISION}/(.+)", "resolve", files.resolve),
    Route("storage", "GET HEAD", rf"/download/{NAME}/{HASH}/(.+)", "download", files.download),
    Route("storage", "PUT", rf"/upload/{NAME}/{HASH}", "upload", uploads.put_object, streams=True),
    Route("storage", "PUT", rf"/upload/{NAME}/{HASH}/(\d+)", "upload", uploads.put_part, streams=True),
)


def find_route(host: str, method: str, path: str) -> tuple[Route, tuple[str, ...]] | None:
    """The route for an undecoded path, and the decoded parts of it; "" for a part that is not there."""
    for route in ROUTES:
        if route.host == host and method in route.methods.split() and (match := re.fullmatch(route.pattern, path)):
            return route, tuple(unquote(part or "") for part in match.groups())
    return None

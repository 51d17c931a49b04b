"""What a request gets from its caller's tenant: its place in queues, and cached prefixes that no other tenant shares.

Without keys there is no tenant, and nothing is changed.
"""

from __future__ import annotations

import hashlib
import json

from msgspec.structs import replace

from serve_app.access.caller import Caller
from serve_app.generation.request import ResolvedRequest


def of_tenant(request: ResolvedRequest, caller: Caller) -> ResolvedRequest:
    """The request with its caller's tenant, weight and salt."""
    if not caller.tenant:
        return request
    salt = tenant_salt(caller.tenant, request.requests[0].cache_salt)
    given = {"tenant": caller.tenant, "weight": caller.weight, "cache_salt": salt}
    return replace(request, requests=tuple(replace(one, **given) for one in request.requests))


def tenant_salt(tenant: str, cache_salt: str) -> str:
    """The salt of cached prefixes. Different pairs never have the same: JSON joins them, and the digest hides them."""
    return hashlib.sha256(json.dumps([tenant, cache_salt]).encode()).hexdigest()

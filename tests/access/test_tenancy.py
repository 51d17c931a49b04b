"""Cached prefixes are a tenant's own: no two pairs of tenant and salt meet."""

from __future__ import annotations

from itertools import combinations

from serve_app.access.tenancy import tenant_salt


def test_no_two_pairs_have_the_same_salt() -> None:
    pairs = [("a", ""), ("a", "b"), ("ab", ""), ("", "ab"), ("a,b", ""), ('a", "b', ""), ("a", '", "b'), ("b", "a")]
    assert all(tenant_salt(*one) != tenant_salt(*other) for one, other in combinations(pairs, 2))
    assert tenant_salt("a", "b") == tenant_salt("a", "b")
    assert "secret" not in tenant_salt("a", "secret")

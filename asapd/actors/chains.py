"""Chains of tokens as the registry judges them: signatures first, then the rules, and what need not be judged twice."""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

from asapd.actors.keyring import KeyDirectory
from asapd.core.delegation import Claims, check_chain, check_standing, narrows, too_deep
from asapd.core.denial import Denied, Reason, deny
from asapd.store.units.delegations import NewDelegation
from asapd.wire.token import SignedToken, TokenMalformed, decode, lineage, verify

MAX_TOKEN_BYTES = 256 * 1024
"""A token holds its parent whole, in base64: the longest chain the configuration allows still fits."""

MAX_REMEMBERED_CHARS = 4 * 1024 * 1024
"""Of the texts remembered. Decoded, with its parents, a token takes at most eight times its text: 32 MiB."""


class Chain(Struct, eq=False, gc=False):
    """A chain whose signatures hold, root first, with the key that verified each.

    `narrows` says that its links were found to narrow, which no later moment can change. `registered` is the id under
    which the ledger has the last token, once it said so: it stays for good.
    """

    tokens: tuple[SignedToken, ...]
    keys: tuple[bytes, ...]
    claims: tuple[Claims, ...]
    narrows: bool = False
    registered: str = ""

    @property
    def leaf(self) -> Claims:
        """What the last token says."""
        return self.claims[-1]

    @property
    def links(self) -> list[NewDelegation]:
        """The tokens as the ledger registers them."""
        return [NewDelegation(token.claims, token.text, token.digest) for token in self.tokens]

    @property
    def accounts(self) -> list[tuple[Claims, bytes]]:
        """What each token says, and its digest."""
        return [(token.claims, token.digest) for token in self.tokens]


class Chains:
    """Opens and judges chains, and remembers what cannot change.

    Only three things are remembered: how a text reads, that a key signed it, and that the links of a chain narrow.
    They follow from the bytes. Whether the key is still the delegator's, the root trusted, a token revoked, expired
    or not yet valid, and the chain short enough, is asked anew every time, so nothing ever has to be forgotten.
    """

    def __init__(self, keys: KeyDirectory) -> None:
        self._keys = keys
        self._by_text: dict[str, Chain] = {}
        self._chars = 0

    def open(self, text: str, *, max_depth: int, now_us: int) -> Chain | Denied:
        """Decode a token and its parents, and check the signature of each.

        Where a token only names its parent, the chain begins with that token: its `parent_id` says who is above.
        """
        chain = self._recall(text)
        if chain is not None and len(chain.tokens) <= max_depth and self._still_signed(chain, now_us):
            return chain
        try:
            tokens = lineage(decode(text, max_depth=max_depth, max_bytes=MAX_TOKEN_BYTES, known=self._read_before))
        except TokenMalformed as error:
            return unreadable(error, max_depth)
        if len(tokens) > max_depth:
            return too_deep(tokens[-1].claims.id, len(tokens), max_depth)
        opened = self._verified(tokens, now_us)
        if isinstance(opened, Chain) and text != tokens[-1].text:
            self._remember(text, opened)
        return opened

    def extend(self, above: Chain, below: Chain, *, max_depth: int) -> Chain | Denied:
        """One chain of the ancestors that were found, and the tokens that name the last of them."""
        count = len(above.tokens) + len(below.tokens)
        if count > max_depth:
            return too_deep(below.leaf.id, count, max_depth)
        return Chain(above.tokens + below.tokens, above.keys + below.keys, above.claims + below.claims)

    def judge(
        self,
        chain: Chain,
        *,
        now_us: int,
        max_depth: int,
        roots: tuple[str, ...],
        is_revoked: Callable[[Claims], bool],
        action: str | None,
        delegate: str | None,
        skew_us: int,
    ) -> Denied | None:
        """Hold a chain to the rules; `roots` are those listed, empty where none is."""
        root = chain.claims[0]
        is_listed = self._keys.is_root(root.delegator, roots)
        founding = self._keys.founding_keys(root.delegator, issued_at_us=root.issued_at_us, now_us=now_us)
        denied = (check_standing if chain.narrows else check_chain)(
            chain.claims,
            now_us=now_us,
            max_depth=max_depth,
            is_trusted_root=lambda _: is_listed and chain.keys[0] in founding,
            is_revoked=is_revoked,
            action=action,
            delegate=delegate,
            skew_us=skew_us,
        )
        chain.narrows = chain.narrows or denied is None
        if denied is not None and denied.reason is Reason.UNTRUSTED_ROOT and is_listed:
            return _key_begins_nothing(root, len(chain.claims) - 1)
        return denied

    def _still_signed(self, chain: Chain, now_us: int) -> bool:
        for claims, key in zip(chain.claims, chain.keys, strict=True):
            if key not in self._keys.public_keys(claims.delegator, issued_at_us=claims.issued_at_us, now_us=now_us):
                return False
        return True

    def _recall(self, text: str) -> Chain | None:
        chain = self._by_text.pop(text, None)
        if chain is not None:
            self._by_text[text] = chain  # used last, forgotten last
        return chain

    def _read_before(self, text: str) -> SignedToken | None:
        chain = self._by_text.get(text)
        return None if chain is None else chain.tokens[-1]

    def _verified(self, tokens: tuple[SignedToken, ...], now_us: int) -> Chain | Denied:
        """The chain, each of whose beginnings is remembered too: the next token may go on from there."""
        chain, start = _NOTHING, 0
        for end in range(len(tokens), 0, -1):
            before = self._recall(tokens[end - 1].text)
            if before is not None and self._still_signed(before, now_us):
                chain, start = before, end
                break
        # Verifying leaves little of anything else in the processor's caches: what can be done before it takes half.
        claims = tuple([token.claims for token in tokens])
        is_narrowing = narrows(claims)
        unseen = [
            (token, self._keys.public_keys(said.delegator, issued_at_us=said.issued_at_us, now_us=now_us))
            for token, said in zip(tokens[start:], claims[start:], strict=True)
        ]
        signers = chain.keys
        for token, keys in unseen:
            for key in keys:
                if verify(token, key):
                    signers += (key,)
                    break
            else:
                break
        for end in range(start + 1, len(signers) + 1):
            chain = Chain(tokens[:end], signers[:end], claims[:end], is_narrowing)
            self._remember(tokens[end - 1].text, chain)
        if len(signers) == len(tokens):
            return chain
        token, keys = unseen[len(signers) - start]
        return _not_signed(token.claims, len(tokens) - 1 - len(signers), is_known=bool(keys))

    def _remember(self, text: str, chain: Chain) -> None:
        if self._by_text.pop(text, None) is None:
            self._chars += len(text)
        self._by_text[text] = chain
        while self._chars > MAX_REMEMBERED_CHARS:
            oldest = next(iter(self._by_text))
            del self._by_text[oldest]
            self._chars -= len(oldest)


_NOTHING = Chain((), (), ())


def _not_signed(claims: Claims, position: int, *, is_known: bool) -> Denied:
    if not is_known:
        return deny(
            Reason.UNKNOWN_KEY,
            "known_key",
            f"no key of {claims.delegator} is known",
            "pin it in the configuration, or import it with `asapctl agents keys import`",
            token=claims.id,
            position=position,
            asked=claims.delegator,
        )
    return deny(
        Reason.BAD_SIGNATURE,
        "signature",
        f"the signature is not by the key of {claims.delegator}",
        "issue the token again",
        token=claims.id,
        position=position,
        granted=claims.delegator,
    )


def _key_begins_nothing(root: Claims, position: int) -> Denied:
    return deny(
        Reason.UNTRUSTED_ROOT,
        "trusted_root",
        f"it is signed with a key of {root.delegator} that was learned from a manifest or came with the agent, "
        "which begins no chain",
        "pin that key in the configuration, or import it with `asapctl agents keys import`",
        token=root.id,
        position=position,
        asked=root.delegator,
    )


def unreadable(error: TokenMalformed, max_depth: int) -> Denied:
    """The denial of a token that cannot be read."""
    if error.too_deep:
        return too_deep(error.token, None, max_depth)
    return deny(
        Reason.MALFORMED,
        "form",
        f"the token cannot be read: {error.reason}",
        "have its issuer correct that and sign it again",
        position=error.parent,
    )

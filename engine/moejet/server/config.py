"""Options of the server. Impossible values raise ValueError naming the field."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from moejet.validation import checked, require_int, require_number, short

ReasoningField = Literal["both", "reasoning_content", "reasoning"]


@dataclass(frozen=True, slots=True)
@checked
class ServerConfig:
    """How requests are taken and answered; what runs them is the engine's.

    host, port: where to listen; an address that others can reach needs api_keys, or insecure=True
    model_name: under which the model is served (None: the last part of its path)
    api_keys: any of them opens all but /health, /ready and the page's own files; empty: no key is asked for
    cors_origins: web pages that may call this server, beside its own; empty: none
    allowed_hosts: names under which it may be addressed, against DNS rebinding; None: localhost, addresses and host
    max_body_bytes, max_header_bytes, max_header_count, max_json_depth: of one request
    header_timeout_s: for a request's headers · body_timeout_s: for its body
    max_n: parallel samples · max_stop: stop strings · max_prompts: prompts of one completion request
    keep_alive_s: silence in a stream after which a comment is sent
    reasoning_field: under which name thinking is returned; clients disagree, so both is the default
    trust_request_template: accept a chat template in a request (never do so for strangers)
    log_prompts: write prompts and answers to the log
    share_cache: let prefixes computed for one of several api_keys be found by the others; the time to the first token
    tells them then what others have asked
    strategies: whether requests may be answered by strategies · max_strategy_samples: that one may ask for
    effort_strategies: whether reasoning_effort "high" and above stands for a strategy where none is named
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    insecure: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None
    max_body_bytes: int = 32 << 20
    max_header_bytes: int = 64 << 10
    max_header_count: int = 128
    max_json_depth: int = 64
    header_timeout_s: float = 20.0
    body_timeout_s: float = 60.0
    max_n: int = 16
    max_stop: int = 16
    max_prompts: int = 1024
    keep_alive_s: float = 15.0
    reasoning_field: ReasoningField = "both"
    trust_request_template: bool = False
    log_prompts: bool = False
    share_cache: bool = False
    strategies: bool = True
    max_strategy_samples: int = 64
    effort_strategies: bool = False

    def __post_init__(self) -> None:
        require_int("port", self.port, 0, 65535, "0: any free one")
        for name in ("max_body_bytes", "max_header_bytes", "max_header_count", "max_json_depth"):
            require_int(name, getattr(self, name), 1)
        for name in ("max_n", "max_stop", "max_prompts", "max_strategy_samples"):
            require_int(name, getattr(self, name), 1)
        for name in ("header_timeout_s", "body_timeout_s", "keep_alive_s"):
            require_number(name, getattr(self, name), above=0, hint="seconds")
        if any(not key for key in self.api_keys):
            raise ValueError("api_keys holds '', an empty key: leave it out, or give the key")
        if not (self.api_keys or self.insecure or is_loopback(self.host)):
            raise ValueError(
                f"host={short(self.host)} can be reached by others, and no api_keys are given: give one "
                "(--api-key), listen on 127.0.0.1, or say --insecure"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

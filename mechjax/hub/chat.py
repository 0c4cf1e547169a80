"""Chat templates: Jinja programs from the checkpoint's folder, rendered in a sandbox as transformers does."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from mechjax.base.errors import TokenError
from mechjax.base.optional import require


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    special: Mapping[str, str],
) -> str:
    """The text that `template` makes of `messages`.

    Args:
        template: Jinja source; it can neither reach Python objects nor change what it is given.
        messages: `{"role": ..., "content": ...}` in order.
        add_generation_prompt: Whether the text ends where the assistant's answer begins.
        special: Named special tokens, such as `bos_token`, that templates refer to.

    Raises:
        TokenError: The template refuses the messages, or is itself broken or hostile.
        MissingExtraError: Jinja is not installed.
    """
    jinja2 = require("jinja2", extra="chat")
    ext, nodes = require("jinja2.ext", extra="chat"), require("jinja2.nodes", extra="chat")
    sandboxes = require("jinja2.sandbox", extra="chat")

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here its body is simply rendered."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    sandbox = sandboxes.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    # Jinja's own `tojson` escapes for HTML.
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False, **options}
    )
    sandbox.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return sandbox.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special,
        )
    except (
        jinja2.TemplateError,
        ArithmeticError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        raise TokenError(
            f"The chat template cannot render these {len(messages)} messages: {error} Messages are dicts with a "
            "`role` (system, user, assistant) and a `content`, usually user and assistant in turn."
        ) from None

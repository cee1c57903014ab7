"""A language model as the judge of answers: rubric, prompts, verdicts, and a client that pays for no call twice.

What needs `openai`, `pydantic` or `json-repair` loads on first use: they come with the extra `judge`.
"""

import lazy_loader


__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

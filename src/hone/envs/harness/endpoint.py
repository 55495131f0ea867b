"""Where an agent program finds its policy: base URLs and the secret of its rollout."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The policy of one rollout, as client libraries want to know it.

    address: without a path, as Anthropic's clients want it. api_key: good for this rollout and as long as it runs.
    model: the name to ask for; any name is served.
    """

    address: str
    api_key: str = field(repr=False)
    model: str

    @property
    def base_url(self) -> str:
        """As OpenAI's clients want it."""
        return self.address + "/v1"

    @property
    def anthropic_base_url(self) -> str:
        """As Anthropic's clients want it."""
        return self.address

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that client libraries read."""
        return {
            "OPENAI_BASE_URL": self.base_url,
            "OPENAI_API_BASE": self.base_url,
            "OPENAI_API_KEY": self.api_key,
            "OPENAI_MODEL": self.model,
            "ANTHROPIC_BASE_URL": self.anthropic_base_url,
            "ANTHROPIC_API_KEY": self.api_key,
            "ANTHROPIC_MODEL": self.model,
        }

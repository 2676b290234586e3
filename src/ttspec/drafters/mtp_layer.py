"""The module of an MTP head: norms, a projection, and a decoder layer of the target's own family.

The layer, its norm and its rotation are transformers' classes, so a head of any family is right as
far as its target is.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights

from ttspec.drafters.functional import ModelFunction, ModelInputs, call_with
from ttspec.drafters.layers import Weights
from ttspec.models.attention import use_folded_attention
from ttspec.models.target import cache_keyword

ROUTING = ".e_score_correction_bias"
"""What balances experts: no parameter, and in the files all the same."""


def one_layer(config: PretrainedConfig) -> Any:
    """A config of one layer with full attention, and with experts if the model has them."""
    text = copy.deepcopy(config.get_text_config())
    text.num_hidden_layers = 1
    for name, value in {
        "layer_types": ["full_attention"],
        "mlp_layer_types": ["sparse"],
        "first_k_dense_replace": 0,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    text.vocab_size, text.pad_token_id = 1, None  # tables are the target's
    return text


class _Cached(Exception):
    """Carries what a layer would cache."""


class _Stop(Cache):
    """Stops a layer where it caches its keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Any:
        """The way out."""
        raise _Cached(key_states, value_states)


def sizes_of(config: Any) -> tuple[int, int, int]:
    """Heads of what a layer caches, and the sizes of its keys and values.

    Asked of the layer itself: DeepSeek's are compressed in some versions of transformers.
    """
    with torch.device("meta"):
        layer = MtpLayer(config)
        state, position = torch.empty(1, 1, config.hidden_size), torch.zeros(1, 1).long()
        try:
            layer(state, state, position, None, _Stop(layers=[]))
        except _Cached as found:
            keys, values = (x.shape for x in found.args)
            return keys[1], keys[3], values[3]
    raise ValueError(f"a layer of {config.model_type} caches no keys and values")


class MtpLayer(nn.Module):
    """State of a token and embedding of the next one to the state of the next one."""

    def __init__(self, config: Any) -> None:
        """A head of a target of this config, of one layer."""
        super().__init__()
        with no_init_weights():
            model: Any = AutoModel.from_config(config)
            self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        use_folded_attention(model)
        self.config = model.config
        self.pre_fc_norm_embedding = copy.deepcopy(model.norm)
        self.pre_fc_norm_hidden = copy.deepcopy(model.norm)
        self.layers, self.norm, self.rotary_emb = model.layers, model.norm, model.rotary_emb

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what a checkpoint holds."""
        routing = {n: b for n, b in self.named_buffers() if n.endswith(ROUTING)}
        return {n: tuple(p.shape) for n, p in {**dict(self.named_parameters()), **routing}.items()}

    def forward(
        self, embedded: Tensor, hidden: Tensor, position: Tensor, mask: Tensor | None, cache: Cache
    ) -> Tensor:
        """What the target's head reads.

        Args:
            embedded: [B, N, H], of the next tokens.
            hidden: [B, N, H], of the tokens.
            position: int64 [B, N].
            mask: What each sees, as attention takes it.
            cache: Keys and values so far.

        Returns:
            [B, N, H].
        """
        both = [self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)]
        x = self.fc(torch.cat(both, dim=-1))
        layer = self.layers[0]
        out = layer(
            x,
            attention_mask=mask,
            position_ids=position,
            position_embeddings=self.rotary_emb(x, position_ids=position),
            **{cache_keyword(layer): cache},
        )
        return self.norm(out[0] if isinstance(out, tuple) else out)


class HeadFunction(ModelFunction):
    """An `MtpLayer` as a function of its weights."""

    def __init__(self, layer: MtpLayer) -> None:
        """Of a layer made by `as_function`."""
        super().__init__(layer, (None,))
        self._routes = any(".experts." in name for name, _ in layer.named_parameters())

    def _beside(
        self, named: Weights, fed: ModelInputs, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without a mask nothing is attended to: only new keys and values are made."""
        if fed.masks:
            return super()._beside(named, fed, keys, values)
        try:
            self._call(named, fed, _Stop(layers=[]))
        except _Cached as found:
            k, v = found.args
            return fed.inputs["hidden"], k[None], v[None]
        raise AssertionError("the layer caches nothing")

    def _rows_apart(
        self, named: Weights, own: set[str], fed: ModelInputs, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which experts a row reads is told by its tokens: no rule of `vmap` goes through that."""
        if not self._routes or not fed.masks:
            return super()._rows_apart(named, own, fed, keys, values)
        found = []
        for i in range(len(fed.position)):
            row = slice(i, i + 1)
            mine = {n: w[i] if n in own else w for n, w in named.items()}
            found.append(self._beside(mine, fed.at(row), keys[:, row], values[:, row]))
        outs, new_keys, new_values = zip(*found, strict=True)
        return torch.cat(outs), torch.cat(new_keys, dim=1), torch.cat(new_values, dim=1)

    def _call(self, named: Weights, fed: ModelInputs, cache: Cache) -> Tensor:
        tokens = fed.inputs["embedded"], fed.inputs["hidden"]
        given = *tokens, fed.position.clamp(min=0), fed.masks.get(None), cache
        return call_with(self.model, named, *given)

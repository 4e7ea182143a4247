"""What transformers alone says of a prompt."""

import torch


def chat(model, text):
    return model.template.encode([{"role": "user", "content": text}])


def reference(model, prompt):
    """transformers alone: (hidden_states, logits) of every position."""
    model.module.set_attn_implementation("sdpa")
    with torch.inference_mode():
        out = model.module(input_ids=torch.tensor([prompt.token_ids]), output_hidden_states=True)
    return out.hidden_states, out.logits[0].float()

"""moejet's CPU experts inside transformers, for any family whose experts compute silu(gate) * up.

Needs `pip install 'moejet[hf]'`.
"""

import os

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # torch's idle threads would take the experts' cores

from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moejet.hf

moejet.hf.register(expert_format="int8")  # "auto", the default, keeps the checkpoint's precision
path = str(files("moejet") / "assets" / "tiny_reasoner")  # or any checkpoint
tokenizer = AutoTokenizer.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moejet")
print(f"{moejet.hf.pack(model)} bytes of experts")

question = [{"role": "user", "content": "Start with 17, add 25."}]
inputs = tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
with torch.inference_mode():
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
print(tokenizer.decode(output[0], skip_special_tokens=True))

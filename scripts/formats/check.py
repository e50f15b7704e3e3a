"""Writes files with the packages that define the formats, and reads with them what rankmix wrote: see check_formats.sh."""

import json
import os
import sys

import gguf
import numpy
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

LAYER = "model.layers.0.self_attn.q_proj"
PREFIX = f"base_model.model.{LAYER}"


def write(folder):
    """One GGUF file with every element type that rankmix reads, and what its elements are; one safetensors file."""
    os.makedirs(folder)
    random = numpy.random.default_rng(1)
    values = random.standard_normal((6, 96), dtype=numpy.float32)
    writer = gguf.GGUFWriter(f"{folder}/all.gguf", "llama")
    writer.add_string("general.name", "grüße")
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.texts", ["a", "", "世界"])
    expected = {}
    for name in ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]:
        kind = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(values, kind)
        if name in ("F32", "F16"):
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, data, raw_dtype=kind)
        expected[name] = gguf.quants.dequantize(data, kind).astype(numpy.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(expected, f"{folder}/expected.safetensors", metadata={"made by": "safetensors"})


def same(what, one, other):
    assert one.shape == other.shape, f"{what}: {one.shape} and {other.shape}"
    assert (one == other).all(), f"{what}: {numpy.abs(one - other).max()} apart"
    print(f"  {what}: {list(one.shape)}, equal")


def read(folder):
    config = json.load(open(f"{folder}/peft/adapter_config.json"))
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8), config
    adapter = load_file(f"{folder}/peft/adapter_model.safetensors")
    a, b = (adapter[f"{PREFIX}.lora_{part}.weight"] for part in "AB")
    for bits, kind in [("32", numpy.float32), ("16", numpy.float16)]:
        file = gguf.GGUFReader(f"{folder}/adapter-f{bits}.gguf")
        assert file.get_field("general.type").contents() == "adapter"
        assert file.get_field("adapter.lora.alpha").contents() == 8.0
        tensors = {tensor.name: tensor.data for tensor in file.tensors}
        for name, matrix in [("lora_a", a), ("lora_b", b)]:
            same(f"GGUF adapter, f{bits}, {name}", tensors[f"blk.0.attn_q.weight.{name}"], matrix.astype(kind))
    model = load_file(f"{folder}/model.safetensors")[f"{LAYER}.weight"]
    file = gguf.GGUFReader(f"{folder}/model.gguf")
    same("GGUF model", file.tensors[0].data, model.astype(numpy.float16))
    base = load_file(f"{folder}/base.safetensors")[f"{LAYER}.weight"]
    apart = numpy.abs(base + config["lora_alpha"] / config["r"] * b @ a - model).max()
    assert apart < 1e-5, apart
    print(f"  merged weight: {apart:.1e} apart")
    read_mixture(folder)


def read_mixture(folder):
    """Our layout for mixtures, and one expert of each as a plain adapter."""
    config = json.load(open(f"{folder}/rotmole/adapter_config.json"))
    assert (config["peft_type"], config["format"], config["format_version"]) == ("ROTMOLE", "rankmix", 1), config
    with safe_open(f"{folder}/rotmole/adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "rankmix", "format_version": "1"}, file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert tensors[f"{PREFIX}.moe_gate.weight"].shape == (4, 64)
    assert tensors[f"{PREFIX}.rotation_gate.3.weight"].shape == (2, 64)
    assert len(tensors) == 1 + 3 * 4, sorted(tensors)
    a, b = (tensors[f"{PREFIX}.experts.2.lora_{part}.weight"] for part in "AB")
    close("expert as LoRA", folder, "rotmole-expert", b @ a)

    tensors = load_file(f"{folder}/rotmole-static/adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}.experts.2.lora_{part}.weight"] for part in "AB")
    rotation = numpy.zeros((4, 4))
    for plane, angle in enumerate(tensors[f"{PREFIX}.rotation_generator"][2].astype(numpy.float64)):
        sin, cos = numpy.sin(angle), numpy.cos(angle)
        at = slice(2 * plane, 2 * plane + 2)
        rotation[at, at] = [[cos, -sin], [sin, cos]]
    close("expert with its rotation as LoRA", folder, "rotmole-static-expert", b @ rotation @ a)

    tensors = load_file(f"{folder}/comol/adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}.lora_{part}.weight"] for part in "AB")
    close("core expert as LoRA", folder, "comol-expert", b @ tensors[f"{PREFIX}.core"][2].T @ a)


def close(what, folder, name, expected):
    """The exported pair against the product of the mixture's tensors."""
    expert = load_file(f"{folder}/{name}/adapter_model.safetensors")
    assert len(expert) == 2, sorted(expert)
    a, b = (expert[f"{PREFIX}.lora_{part}.weight"].astype(numpy.float64) for part in "AB")
    apart = numpy.abs(b @ a - expected).max() / numpy.abs(expected).max()
    assert apart < 1e-6, f"{what}: {apart}"
    print(f"  {what}: {apart:.1e} apart")


def read_with_peft(folder):
    """The adapter loaded by PEFT computes what the merged weight does."""
    import torch
    from peft import PeftModel

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(64, 48, bias=False)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = Attention()

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer()])

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Inner()

        def forward(self, x):
            return self.model.layers[0].self_attn.q_proj(x)

    weight = torch.from_numpy(load_file(f"{folder}/base.safetensors")[f"{LAYER}.weight"])
    x = torch.randn(5, 64)

    def adapted(name):
        model = Model()
        model.model.layers[0].self_attn.q_proj.weight.data = weight.clone()
        return PeftModel.from_pretrained(model, f"{folder}/{name}")(x)

    merged = torch.from_numpy(load_file(f"{folder}/model.safetensors")[f"{LAYER}.weight"])
    apart = (adapted("peft") - x @ merged.T).abs().max().item()
    assert apart < 1e-4, apart
    print(f"  adapter in PEFT against the merged weight: {apart:.1e} apart")
    for name in ["rotmole-expert", "rotmole-static-expert", "comol-expert"]:
        expert = load_file(f"{folder}/{name}/adapter_model.safetensors")
        a, b = (torch.from_numpy(expert[f"{PREFIX}.lora_{part}.weight"]) for part in "AB")
        plain, change = x @ weight.T, 8 / 4 * (x @ a.T) @ b.T
        apart = ((adapted(name) - plain - change).abs().max() / change.abs().max()).item()
        assert apart < 1e-5, f"{name}: {apart}"
        print(f"  {name} in PEFT: {apart:.1e} apart")


def write_with_peft(folder):
    """Models, adapters that PEFT saves for them, and what PEFT makes of both: merged weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file as save_tensors

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(11, 8)
            self.q_proj = torch.nn.Linear(8, 6)
            self.score = torch.nn.Linear(6, 3)

        def get_input_embeddings(self):
            return self.embed_tokens

        def get_output_embeddings(self):
            return None

        def forward(self, tokens):
            return self.score(self.q_proj(self.embed_tokens(tokens)))

    torch.manual_seed(1)
    for name, options in {
        "wrapped": dict(target_modules=["q_proj", "embed_tokens"], bias="all", modules_to_save=["score"]),
        "bias": dict(target_modules=["q_proj"], lora_bias=True, use_rslora=True),
    }.items():
        at = f"{folder}/{name}"
        os.makedirs(f"{at}/model")
        model = Model()
        save_tensors(model.state_dict(), f"{at}/model/model.safetensors")
        json.dump({"architectures": ["Model"]}, open(f"{at}/model/config.json", "w"))
        adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, **options))
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
        adapted.save_pretrained(f"{at}/adapter")
        merged = adapted.merge_and_unload().state_dict()
        save_tensors({key: value.contiguous() for key, value in merged.items()}, f"{at}/expected.safetensors")


def merged_as_peft(folder):
    """rankmix's merge of an adapter against PEFT's."""
    expected = load_file(f"{folder}/expected.safetensors")
    base = load_file(f"{folder}/model/model.safetensors")
    found = {}
    for file in sorted(os.listdir(f"{folder}/merged")):
        if file.endswith(".safetensors"):
            found |= load_file(f"{folder}/merged/{file}")
    assert found.keys() == expected.keys(), (found.keys(), expected.keys())
    apart = max(numpy.abs(found[key] - expected[key]).max() for key in expected)
    changed = sum((found[key] != base[key]).any() for key in expected)
    assert apart < 1e-5 and changed > 1, (apart, changed)
    print(f"  {os.path.basename(folder)}: {changed} tensors merged as PEFT merges them: {apart:.1e} apart")


if sys.argv[1] == "write":
    write(sys.argv[2])
    if "--peft" in sys.argv:
        write_with_peft(sys.argv[2])
elif sys.argv[1] == "merged":
    merged_as_peft(sys.argv[2])
else:
    read(sys.argv[2])
    if "--peft" in sys.argv:
        read_with_peft(sys.argv[2])

# SPDX-License-Identifier: Apache-2.0
"""Batches of two examples for speech, boxes, masks, choices, images with text and series."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from architecture_cases import Case
from architecture_sizes import FIRST_TOKEN, LABELS, LENGTH, PADDING, VOCABULARY
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


Batch = dict[str, Any]
SAMPLES, FRAMES, MEL_BINS, TARGETS = 1280, 100, 32, 4


def parameters_of(model: PreTrainedModel) -> set[str]:
    """Return the names of what a model's `forward` takes."""
    return set(inspect.signature(model.forward).parameters)


def tokens(*shape: int) -> Tensor:
    """Return tokens without a special meaning."""
    return torch.randint(FIRST_TOKEN, VOCABULARY, shape)


def padded(length: int, *, by: int) -> Tensor:
    """Return the mask of two examples, the second of which is shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - by :] = 0
    return mask


# --- Speech --------------------------------------------------------------------------------------------------------

FEATURES = {"granite_speech5_ctc": 128, "seamless_m4t": 160, "seamless_m4t_v2": 160, "granite_speech": 160,
            "granite_speech_plus": 160, "fun_asr_nano": 224, "voxtral_realtime": 32}  # fmt: skip
"""Numbers in a frame of a spectrogram, where they are not those of a small model's configuration."""
CHANNELS_FIRST = {"whisper", "voxtral", "voxtral_realtime", "qwen3_asr"}


def sound(case: Case, model: PreTrainedModel) -> Batch:
    """Return two recordings, as samples or as frames of a spectrogram."""
    takes = parameters_of(model)
    if "input_values" in takes:
        return {"input_values": torch.randn(2, SAMPLES), "attention_mask": padded(SAMPLES, by=256)}
    frames = {"whisper": 64, "voxtral": 64, "fun_asr_nano": 48, "voxtral_realtime": 96}.get(case.model_type, FRAMES)
    features = torch.randn(2, frames, FEATURES.get(case.model_type, MEL_BINS))
    if case.model_type in CHANNELS_FIRST:
        features = features.transpose(1, 2)
    masks = {name: padded(frames, by=16) for name in ("attention_mask", "input_features_mask")}
    return {"input_features": features} | masks


def transcribed(case: Case, model: PreTrainedModel) -> Batch:
    """Return recordings with their text, the second of which is shorter."""
    takes = parameters_of(model)
    labels = tokens(2, TARGETS)
    labels[1, -1] = -100
    if case.model_type == "dia":
        codes = tokens(2, LENGTH, model.config.decoder_config.num_channels)
        return {"input_ids": tokens(2, LENGTH), "decoder_input_ids": codes, "labels": codes.transpose(1, 2).flatten()}
    if case.model_type == "kyutai_speech_to_text":
        ids = tokens(2, LENGTH, model.config.num_codebooks + 1)
        return {"input_ids": ids, "labels": ids[..., 0]}
    if "input_ids" in takes and case.model_type != "pop2piano":
        return spoken_to(case, model)
    return {name: value for name, value in sound(case, model).items() if name in takes} | {"labels": labels}


def transduced(case: Case, model: PreTrainedModel) -> Batch:
    """Return recordings with their text, before which a decoder is given a blank."""
    labels = tokens(2, TARGETS)
    blank = torch.full((2, 1), model.config.blank_token_id)
    batch = sound(case, model)
    del batch["input_features_mask"]
    return batch | {"labels": labels, "decoder_input_ids": torch.cat([blank, labels], dim=1)}


def spoken_to(case: Case, model: PreTrainedModel) -> Batch:
    """Return two recordings inside a text of which the model is to predict the rest."""
    batch = sound(case, model)
    takes = parameters_of(model)
    if "input_values" in takes:
        samples = torch.randn(2, 1, 6400)
        batch = {"input_values": samples, "padding_mask": torch.ones(2, samples.shape[-1], dtype=torch.bool)}
    if case.model_type.startswith("granite_speech"):
        batch["input_features_mask"] = None
    batch.pop("attention_mask", None)
    names = ("audio_token_id", "audio_token_index")
    token = next((vars(model.config)[name] for name in names if isinstance(vars(model.config).get(name), int)), None)
    if case.model_type == "voxtral_realtime":  # adds sound to each token
        ids = tokens(2, LENGTH)
        return batch | {"input_ids": ids, "labels": ids, "num_delay_tokens": 2, "input_features_mask": None}
    if case.model_type == "vibevoice":  # the sound is what it speaks
        batch = {}
    counts = number_of_features(model, batch, "audio") if batch else [0, 0]
    ids, mask = around(counts, token or 0)
    labels = ids.masked_fill((mask == 0) | (ids == token), -100)
    batch |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value for name, value in batch.items() if name in takes and value is not None}


def around(counts: list[int], token: int) -> tuple[Tensor, Tensor]:
    """Return two texts with so many places in them, the shorter padded, and their mask."""
    text = tokens(2, LENGTH)
    rows = [
        torch.cat([row[:2], torch.full((count,), token), row[2:]]) for row, count in zip(text, counts, strict=True)
    ]
    rows[1] = rows[1][:-PADDING]
    length = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row.new_zeros(length - len(row))]) for row in rows])
    mask = torch.stack([(torch.arange(length) < len(row)).long() for row in rows])
    return ids, mask


# --- Images with boxes and masks -----------------------------------------------------------------------------------


def images(model: PreTrainedModel) -> Tensor:
    """Return two images of the size that the model takes."""
    return torch.randn(2, 3, *image_size(model.config))


def image_size(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the height and width that a model takes; an arbitrary one where the configuration names none."""
    for part in ("encoder", "vlm_config", "vision_config", "backbone_config"):
        if isinstance(vars(config).get(part), PreTrainedConfig):
            config = vars(config)[part]
    size = vars(config).get("image_size", 64)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def boxes(case: Case, model: PreTrainedModel) -> Batch:
    """Return images with two objects and one."""
    pixels = images(model)
    centres = [torch.tensor([[0.3, 0.4, 0.3, 0.5], [0.7, 0.6, 0.4, 0.3]]), torch.tensor([[0.5, 0.5, 0.6, 0.8]])]
    classes = [torch.tensor([0, 2]), torch.tensor([1])]
    labels = [{"class_labels": kind, "boxes": box} for kind, box in zip(classes, centres, strict=True)]
    if "input_ids" not in parameters_of(model):
        return {"pixel_values": pixels, "labels": labels}
    if not case.model_type.endswith("grounding-dino"):
        ids = tokens(2, LENGTH)
        return {"pixel_values": pixels, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = torch.tensor([[101, 30, 1012, 31, 1012, 32, 1012, 102]] * 2)  # three classes, with dots between them
    return {"pixel_values": pixels, "labels": labels, "input_ids": names, "attention_mask": torch.ones_like(names)}


def boxes_and_masks(case: Case, model: PreTrainedModel) -> Batch:
    """Return images with two objects and one, each with its mask."""
    batch = boxes(case, model)
    height, width = batch["pixel_values"].shape[-2:]
    for target in batch["labels"]:
        target["masks"] = (torch.rand(len(target["boxes"]), height, width) < 0.5).float()
    if "mask_labels" not in parameters_of(model):
        return batch
    labels = batch.pop("labels")
    if case.model_type == "videomt":
        batch = {"pixel_values_videos": batch["pixel_values"][:, None]}
    if case.model_type == "oneformer":
        batch |= {"task_inputs": tokens(2, 8), "text_inputs": tokens(2, 4, 8)}
    return batch | {
        "mask_labels": [target["masks"] for target in labels],
        "class_labels": [target["class_labels"] for target in labels],
    }


def pixels_with_classes(case: Case, model: PreTrainedModel) -> Batch:
    """Return images with a class for each pixel, some of them void (255)."""
    pixels = images(model)
    labels = torch.randint(LABELS, (2, *pixels.shape[-2:]))
    labels[0, :4] = 255
    return {"pixel_values": pixels, "labels": labels}


def masked_images(case: Case, model: PreTrainedModel) -> Batch:
    """Return images of which a model is to paint what is covered; some draw the cover themselves."""
    config = model.config
    pixels = images(model)
    if "bool_masked_pos" not in parameters_of(model):
        return {"pixel_values": pixels}
    patches = (config.image_size // config.patch_size) ** 2
    if case.model_type == "videomae":
        frames = torch.randn(2, config.num_frames, 3, *pixels.shape[-2:])
        patches *= config.num_frames // config.tubelet_size
        covered = (torch.arange(patches) % 2 == 0).repeat(2, 1)
        return {"pixel_values": frames, "bool_masked_pos": covered}
    return {"pixel_values": pixels, "bool_masked_pos": torch.rand(2, patches) < 0.5}


# --- Choices and series --------------------------------------------------------------------------------------------


def choices(case: Case, model: PreTrainedModel) -> Batch:
    """Return two questions with three answers each."""
    mask = padded(LENGTH, by=PADDING)[:, None].repeat(1, LABELS, 1)
    batch = {"input_ids": tokens(2, LABELS, LENGTH) * mask, "attention_mask": mask, "labels": torch.tensor([0, 2])}
    if case.model_type == "longformer":
        batch["global_attention_mask"] = (torch.arange(LENGTH) == 0).long().repeat(2, LABELS, 1)
    return {name: value for name, value in batch.items() if name in parameters_of(model)}


def series(case: Case, model: PreTrainedModel) -> Batch:
    """Return two series with what follows; the first one lacks a value."""
    config = model.config
    if case.model_type.startswith("timesfm"):
        return {
            "past_values": [torch.randn(config.context_length), torch.randn(config.context_length)],
            "future_values": torch.randn(2, config.horizon_length),
        } | ({"freq": [torch.tensor(0), torch.tensor(1)]} if case.model_type == "timesfm" else {})
    if case.model_type.startswith("patchts"):
        past = torch.randn(2, config.context_length, config.num_input_channels)
        future = torch.randn(2, config.prediction_length, config.num_input_channels)
        target = torch.tensor([0, 2]) if "Classification" in case.class_name else torch.randn(2, config.num_targets)
        batch = {"past_values": past, "future_values": future, "target_values": target}
        return {name: value for name, value in batch.items() if name in parameters_of(model)}
    length = config.context_length + max(config.lags_sequence)
    observed = torch.ones(2, length)
    observed[0, 2] = 0
    return {
        "past_values": torch.randn(2, length),
        "past_time_features": torch.randn(2, length, config.num_time_features),
        "past_observed_mask": observed,
        "future_values": torch.randn(2, config.prediction_length),
        "future_time_features": torch.randn(2, config.prediction_length, config.num_time_features),
    }


# --- Images with text ----------------------------------------------------------------------------------------------


def captions(case: Case, model: PreTrainedModel) -> Batch:
    """Return two images, each with the text that belongs to it."""
    mask = padded(LENGTH, by=PADDING)
    ids = tokens(2, LENGTH) * mask
    end = vars(model.config.get_text_config()).get("eos_token_id")
    if isinstance(end, int):
        ids[0, -1] = ids[1, -PADDING - 1] = end
    name = "pixel_values_videos" if "pixel_values_videos" in parameters_of(model) else "pixel_values"
    pixels = images(model)
    if name == "pixel_values_videos":
        pixels = pixels[:, None].repeat(1, model.config.vision_config.num_frames, 1, 1, 1)
    batch = {"input_ids": ids, "attention_mask": mask, name: pixels, "return_loss": True}
    return {name: value for name, value in batch.items() if name in parameters_of(model)}


def questions_on_images(case: Case, model: PreTrainedModel) -> Batch:
    """Return two images, each with a text of which the model is to predict the rest.

    Where the text holds a place for each feature of the image, there are as many as the model has features.
    """
    takes = parameters_of(model)
    batch = pictures(case, model)
    if "qformer_input_ids" in takes:
        batch["qformer_input_ids"] = tokens(2, 8)
    kind = "video" if case.model_type == "instructblipvideo" else "image"
    token = None if case.model_type in WITHOUT_PLACES else image_token_of(model.config)
    ids, mask = around([0, 0] if token is None else number_of_features(model, batch, kind), token or 0)
    labels = ids.masked_fill((mask == 0) | (ids == token), -100)
    if model.config.is_encoder_decoder:
        labels = tokens(2, LENGTH)
    batch |= {"input_ids": ids, "attention_mask": mask, "labels": labels}
    batch["mm_token_type_ids"] = (ids == token) * torch.ones_like(ids)
    batch["token_type_ids"] = (torch.arange(ids.shape[1]) > 10).long().repeat(2, 1)
    batch |= EXTRAS.get(case.model_type, lambda ids: {})(ids)
    return {name: value for name, value in batch.items() if name in takes}


WITHOUT_PLACES = {"mllama", "evolla"}
FIVE_DIMENSIONS = {"idefics", "idefics2", "idefics3", "smolvlm", "granite_docling"}
TILED = {"llava_next", "llava_next_video", "llava_onevision", "granite4_vision"}
ROWS_OF_PATCHES = {"gemma4", "gemma4_unified", "diffusion_gemma", "lfm2_vl", "fuyu"}
SIZED = {"llava_next", "llava_next_video", "llava_onevision", "granite4_vision", "mistral3", "lighton_ocr",
         "mistral_large4", "emu3"}  # fmt: skip


def pictures(case: Case, model: PreTrainedModel) -> Batch:
    """Return two images as the model takes them: whole, in tiles, or as rows of patches."""
    takes = parameters_of(model)
    if "image_grid_thw" in takes:
        return patches_in_grids(case, model)
    if case.model_type in ROWS_OF_PATCHES:
        values = vars(model.config) | vars(vars(model.config).get("vision_config") or model.config)
        size = 3 * values["patch_size"] ** 2
        if case.model_type == "gemma4_unified":
            size *= values["pooling_kernel_size"] ** 2
        where = torch.cartesian_prod(torch.arange(4), torch.arange(4)).repeat(2, 1, 1)
        shapes = torch.tensor([[4, 4], [4, 4]])
        return {
            "pixel_values": torch.rand(2, 16, size),
            "image_position_ids": where,
            "spatial_shapes": shapes,
            "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        }
    pixels = images(model)
    if case.model_type == "florence2":
        pixels = pixels[..., :32, :32]
    batch: Batch = {"pixel_values": pixels}
    if case.model_type in FIVE_DIMENSIONS:
        batch["pixel_values"] = pixels[:, None]
        if case.model_type == "granite_docling":
            batch["pixel_attention_mask"] = torch.ones(2, 1, dtype=torch.bool)
    if case.model_type in TILED:
        batch["pixel_values"] = torch.stack([pixels, pixels.flip(-1)], dim=1)
    if case.model_type in SIZED:
        batch["image_sizes"] = torch.tensor([list(pixels.shape[-2:])] * 2)
    if case.model_type == "mllama":
        batch["pixel_values"] = pixels[:, None, None]
        batch["aspect_ratio_ids"] = torch.ones(2, 1, dtype=torch.long)
        batch["aspect_ratio_mask"] = torch.ones(2, 1, 1, dtype=torch.long)
    if case.model_type == "pix2struct":
        rows = torch.cartesian_prod(torch.arange(1, 5), torch.arange(1, 5)).float().repeat(2, 1, 1)
        batch = {"flattened_patches": torch.cat([rows, torch.randn(2, 16, 768)], dim=-1)}
    if "pixel_values_images" in takes:
        batch["pixel_values_images"] = pixels
    if case.model_type == "inkling_mm_model":
        batch["pixel_values"] = torch.randn(2, 2, 40, 40, 3)
    if case.model_type.startswith("minicpm"):
        size = model.config.vision_config.patch_size
        batch = {"pixel_values": torch.randn(1, 3, size, 2 * 16 * size), "target_sizes": torch.tensor([[4, 4]] * 2)}
    if case.model_type == "pi0":
        batch |= {
            "pixel_values": pixels[:, None], "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
            "state": torch.randn(2, 32), "actions": torch.randn(2, model.config.chunk_size, 32),
        }  # fmt: skip
    if case.model_type == "instructblipvideo":
        batch["pixel_values"] = pixels[:, None].repeat(1, 4, 1, 1, 1)
    if "high_res_pixel_values" in takes:
        size = model.config.high_res_vision_config.image_size
        batch["high_res_pixel_values"] = torch.randn(2, 3, size, size)
    return batch


def patches_in_grids(case: Case, model: PreTrainedModel) -> Batch:
    """Return two images of four by four patches, one after the other."""
    values = vars(model.config.vision_config)
    patch, channels = values["patch_size"], values.get("in_channels", values.get("num_channels", 3))
    grid = torch.tensor([[1, 4, 4]] * 2)
    times = 2 if case.model_type.startswith("muse") else values.get("temporal_patch_size", 1)
    pixels = torch.randn(32, channels * patch**2 * times)
    if case.model_type in ("kimi_k25", "paddleocr_vl"):
        pixels = pixels.unflatten(1, (channels, patch, patch))
    return {"pixel_values": pixels, "image_grid_thw": grid, "image_merge_sizes": torch.tensor([2, 2])}


EXTRAS: dict[str, Callable[[Tensor], Batch]] = {
    "idefics": lambda ids: {"image_attention_mask": torch.ones(*ids.shape, 1, dtype=torch.long)},
    "mllama": lambda ids: {"cross_attention_mask": torch.ones(*ids.shape, 1, 1, dtype=torch.long)},
    "udop": lambda ids: {"bbox": torch.rand(*ids.shape, 4)},
    "vilt": lambda ids: {"labels": torch.rand(2, LABELS)},
    "blip": lambda ids: {"labels": tokens(*ids.shape)},
    "evolla": lambda ids: {"protein_input_ids": tokens(2, 8), "protein_attention_mask": torch.ones(2, 8).long()},
    "kosmos-2": lambda ids: {"image_embeds_position_mask": (torch.arange(ids.shape[1]) < 4).long().repeat(2, 1)},
}
"""What else a model must be given, by the tokens of its texts."""


def image_token_of(config: PreTrainedConfig) -> int | None:
    """Return the token that holds the place of an image's feature; `None` if the model has none."""
    names = ("image_token_id", "image_token_index")
    return next((vars(config)[name] for name in names if isinstance(vars(config).get(name), int)), None)


def number_of_features(model: PreTrainedModel, batch: Batch, kind: str) -> list[int]:
    """Return how many features a model has of each of two images or recordings."""
    name = f"get_{kind}_features"
    get = next(getattr(part, name) for part in (model, model.base_model) if name in dir(type(part)))
    names = set(inspect.signature(get).parameters)
    if "kwargs" in names and len(names) < 3:  # passes all on
        names = set(inspect.signature(getattr(model.base_model, name)).parameters)
    given = {name: value for name, value in batch.items() if name in names and value is not None}
    if any(len(value) != 2 for value in given.values()):  # patches of both images in one row
        return [count_of(get(**given)) // 2] * 2
    return [count_of(get(**{name: value[i : i + 1] for name, value in given.items()})) for i in range(2)]


def count_of(found: Any) -> int:
    """Return the number of features, of any number of images."""
    features = found
    if not isinstance(found, (Tensor, list, tuple)):
        features = found.last_hidden_state if found.pooler_output is None else found.pooler_output
    pieces = [features] if isinstance(features, Tensor) else features
    return sum(piece.numel() // piece.shape[-1] for piece in pieces)


KIND_BATCHES: dict[str, Callable[[Case, PreTrainedModel], Batch]] = {
    "CTC": transcribed,
    "transducer": transduced,
    "speech seq2seq": transcribed,
    "object detection": boxes,
    "semantic segmentation": pixels_with_classes,
    "instance segmentation": boxes_and_masks,
    "masked image modeling": masked_images,
    "multiple choice": choices,
    "image-text contrast": captions,
    "image-text to text": questions_on_images,
    "visual question answering": questions_on_images,
    "time series": series,
    "time series prediction": series,
    "time series classification": series,
    "time series regression": series,
}
"""How to make a batch for the lists that are not text alone."""

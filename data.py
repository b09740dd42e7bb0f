"""From the plain form of a modality to the encoder's tensor, and from a source to training batches.

Preprocessing follows the paper's appendix and the released inference code
(https://arxiv.org/abs/2305.05665). In reading order: one item (load, transform), what training varies,
samples, batches and their order.

Whatever the file or generator behind it, a modality is first *read* into one plain form (files/decode.py):
image (H, W, 3) uint8, video a `Video`, text a string, audio a waveform (channels, T) at 16 kHz, depth
the disparity (H, W), NaN where nothing was measured, thermal (H, W) in 0..1, imu (6, T). Then it is
*transformed*, here, to the tensor that the encoder of a given config reads.

    python data.py SPEC       # looks at whatever --data takes, and says which command would use it
"""

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio
from PIL import Image

from clip_weights import tokenizer
from files.decode import OPENERS, SAMPLE_RATE, DataError, Sound, Video, errors_named, pixels, rgb_picture
from files.randaugment import MOVES, draw_operations, operate
from model import preset

AUDIO_MEAN, AUDIO_STD = -4.268, 9.138  # of log-mel energies on AudioSet
DEPTH_MEAN, DEPTH_STD = 0.0418, 0.0295  # of disparities, in the units of files/decode.py's to_disparity
CLIP_SECONDS = 2  # of sound and video that an encoder sees at once
AUDIO_CLIPS, VIDEO_CLIPS = 3, 5  # of one item in evaluation; their embeddings are averaged


def load(modality, item, config=None, **options):
    """The evaluation tensor of one item: text itself, the path or the bytes of a file, or what is in memory.

    image (3, 224, 224); text (77,) token ids; audio (3 clips, 1, 128, 204); depth and thermal
    (1, 224, 224); imu (6, 2000); video (5 clips * 3 crops, 3, 2, 224, 224); other sizes where
    `config` (an EncoderConfig, as model.encoder(modality).config) says so. In memory: a Pillow picture,
    arrays or tensors (shapes in files/README.md). Options are the reader's (files/decode.py): depth takes
    baseline, focal_length, scale and sunrgbd, thermal low and high, audio start, seconds and, of samples in
    memory, their rate (Hz), video the fps of frames. Raises DataError.
    """
    name = item if isinstance(item, (str, Path)) else f"these {modality} data"
    # Whatever goes wrong below becomes one line that names the item.
    with errors_named(name):
        x = OPENERS[modality](item, **options)
        return transform(modality, x, config or preset("huge", modality))


def transform(modality, x, config, rng=None, view=None):
    """The plain form of a modality -> the encoder's tensor, finite. Raises DataError.

    Without rng as in evaluation; with one, and a View of the whole sample, as in training.
    """
    if rng is None or modality not in TRAINING:
        x = EVALUATION[modality](x, config)
    else:
        x = TRAINING[modality](x, config, rng, view or View())
    # One number that is not finite would make every weight so. It makes the sum so, too, which is cheap.
    if not x.sum().isfinite():
        raise DataError(f"its {modality} has values so extreme that its tensor is not finite")
    return x


# ---------------------------------------------------------------------------------------------
# Each modality in evaluation: the plain form, config -> tensor


def evaluate_image(x, config):
    """A picture, (H, W, 3) uint8 or not yet decoded -> (3, size, size)."""
    picture = resize_and_crop(rgb_picture(x), config.input_shape[-1])
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return normalise(x.float() / 255, config)


def resize_and_crop(picture, size):
    """Short side to `size` by Pillow's antialiased bicubic, then the centre square."""
    W, H = picture.size
    # Rounded down, as torchvision does.
    if W <= H:
        W, H = size, int(size * H / W)
    else:
        W, H = int(size * W / H), size
    picture = picture.resize((W, H), Image.Resampling.BICUBIC)
    left = round((W - size) / 2)
    top = round((H - size) / 2)
    return picture.crop((left, top, left + size, top + size))


def normalise(x, config):
    """(..., 3, H, W) in 0..1 -> zero mean and unit deviation per channel, as the encoder was trained with."""
    mean = torch.tensor(config.mean)[:, None, None]
    std = torch.tensor(config.std)[:, None, None]
    return (x - mean) / std


def evaluate_text(x, config):
    return tokenizer(config.vocab).encode(x, config.input_shape[0])


def evaluate_audio(x, config):
    """Waveform or Sound (channels, T) at 16 kHz -> log-mel clips (3, 1, bins, frames), spread over it.

    204 frames of 10 ms show 2 s of sound; a shorter sound is followed by zeros. Of several channels the
    first is heard.
    """
    seconds = clip_seconds(config)
    # Only of what is too large to be decoded whole, the clips alone are.
    if not (isinstance(x, Sound) and x.is_large):
        x = x[:, :].clone()
    clips = []
    for start in spread(x.shape[1] / SAMPLE_RATE, seconds, AUDIO_CLIPS):
        clip = cut_clip(x, start, seconds)
        # In place, so that where clips overlap the mean is taken off again. So does the original, and
        # in a bin that is near silent beside loud ones the rounding shows.
        clip -= clip.mean()
        clips.append(log_mel(clip[:1], config))
    return torch.stack(clips)


def clip_seconds(config):
    """Length of the sound that an encoder reads, as an exact fraction."""
    return Fraction(CLIP_SECONDS * config.input_shape[-1], 204)


def cut_clip(wave, start, seconds, channels=None):
    """The part (channels, t) of a waveform or Sound from `start` (s) on, of all or the first channels."""
    return wave[:channels, int(start * SAMPLE_RATE) : int((start + seconds) * SAMPLE_RATE)]


def spread(duration, clip, count):
    """Starts (s) of `count` clips spread evenly over a duration; all 0 if it is shorter than a clip.

    A step is 1 / count of the room, as in the sampler of pytorchvideo's releases (tag 0.1.3), which
    the original's recorded figures agree with; its later commits step by 1 / (count - 1), up to the
    very end. Exact fractions, as there: by rounding, a start decides which sample comes
    first, and one sample moves a spectrogram visibly.
    """
    room = Fraction(max(0.0, duration - clip))
    return [room * i / count for i in range(count)]


def log_mel(wave, config):
    """Waveform (1, T), its mean taken off -> normalised log-mel picture (1, bins, frames)."""
    _, bins, frames = config.input_shape
    return (filter_bank(wave, bins, frames) - AUDIO_MEAN) / AUDIO_STD


def filter_bank(wave, bins, frames):
    """Waveform (1, T) at 16 kHz -> Kaldi's log-mel filter bank (1, bins, frames)."""
    wave = F.pad(wave, (0, max(0, 400 - wave.shape[1])))  # one window of 25 ms at least
    mel = torchaudio.compliance.kaldi.fbank(
        wave, htk_compat=True, sample_frequency=SAMPLE_RATE, use_energy=False, window_type="hanning",
        num_mel_bins=bins, dither=0.0, frame_length=25, frame_shift=10)  # (frames, bins); ms
    mel = mel.T[None, :, :frames]
    return F.pad(mel, (0, frames - mel.shape[2]))


def evaluate_depth(x, config):
    return normalise_depth(evaluate_map(x, config))


def normalise_depth(x):
    """Disparity -> zero mean and unit deviation, and 0 where nothing was measured (NaN)."""
    return ((x - DEPTH_MEAN) / DEPTH_STD).nan_to_num(nan=0.0)


def evaluate_map(x, config):
    """A one-channel picture (H, W) float -> (1, size, size), resized and cropped as images are.

    Thermal's 0..1 go in like this: neither the paper nor the released code names a mean and deviation.
    """
    def resample(x):
        picture = resize_and_crop(Image.fromarray(x.numpy()), config.input_shape[-1])
        return torch.from_numpy(np.array(picture))

    return around_holes(torch.from_numpy(x), resample)[None]


def around_holes(x, resample):
    """resample(x) of a map (H, W) with NaN: a pixel is of what was measured, NaN if less than half of it was.

    Otherwise a hole would reach into its neighbours, or its neighbours into the hole.
    """
    measured = x.isfinite()
    if measured.all():
        return resample(x)
    total = resample(torch.where(measured, x, 0.0))
    share = resample(measured.float())
    return torch.where(share > 0.5, total / share, torch.nan)


def evaluate_imu(x, config):
    """(6, T) -> (6, steps), resampled linearly in time to the encoder's number of steps."""
    x = torch.from_numpy(np.ascontiguousarray(x))[None]
    return F.interpolate(x, config.input_shape[1], mode="linear", align_corners=True)[0]


def evaluate_video(x, config):
    """Clips of 2 s, spread evenly, of three squares along the longer side: (clips * 3, 3, T, size, size)."""
    frames, size = config.input_shape[1], config.input_shape[-1]
    crops = []
    for start in spread(x.count / x.fps, CLIP_SECONDS, VIDEO_CLIPS):
        # Two frames of each clip, the first and the last.
        clip = x.frames(clip_frames(x, start, frames)).float() / 255  # (T, 3, H, W)
        clip = normalise(resize_short_side(clip, size), config)
        H, W = clip.shape[-2:]
        # Left, middle and right; of an upright video top, middle and bottom.
        for part in (0.0, 0.5, 1.0):
            top = math.ceil((H - size) * part)
            left = math.ceil((W - size) * part)
            crop = clip[..., top : top + size, left : left + size]
            crops.append(crop.transpose(0, 1))  # (3, T, size, size)
    return torch.stack(crops)


def resize_short_side(clip, size):
    """(T, 3, H, W) -> its short side `size`, bilinear without antialiasing, as pytorchvideo does."""
    H, W = clip.shape[-2:]
    if W <= H:
        H, W = int(H / W * size), size
    else:
        H, W = size, int(W / H * size)
    return F.interpolate(clip, (H, W), mode="bilinear", align_corners=False)


def clip_frames(video, start, count):
    """Indices of `count` frames spread from the first to the last frame of a clip of 2 s."""
    first = min(math.ceil(video.fps * start), video.count - 1)
    end = min(math.ceil(video.fps * (start + CLIP_SECONDS)), video.count)
    last = max(first, end - 1)
    return np.linspace(first, last, count).astype(int).tolist()


EVALUATION = {
    "image": evaluate_image,
    "text": evaluate_text,
    "audio": evaluate_audio,
    "depth": evaluate_depth,
    "thermal": evaluate_map,
    "imu": evaluate_imu,
    "video": evaluate_video,
}


# ---------------------------------------------------------------------------------------------
# What training varies (paper, appendix B, table 9): the plain form, config, rng, view -> tensor
#
#   none     of pictures and maps nothing: IMU
#   basic    random crop and flip: audio wants the picture no stronger (table 5d)
#   strong   also RandAugment, colours, a rectangle erased: depth and thermal
AUGMENTATIONS = ("none", "basic", "strong")


@dataclass
class View:
    """The random choices that all modalities of a sample share; places and sizes are fractions.

    A depth or thermal map is cropped, flipped, turned and erased as its picture is: apart, a map learns much
    worse (table 5e). Sound and picture of a video are of the same moment (table 5g).
    """

    width: float = None  # of the crop; None: of the middle square, as in evaluation
    height: float = None
    x: float = 0.5  # of the room that the crop leaves
    y: float = 0.5
    flip: bool = False
    moment: float = 0.5  # of the room that a clip leaves in a recording
    seconds: float = math.inf  # length of the sample's shortest recording
    mode: str = "bicubic"  # of resizing
    operations: tuple = ()  # RandAugment's: (name, strength) of each
    jitter: tuple = ()  # factors of brightness, contrast, saturation
    erased: tuple = ()  # top, left, height, width of a rectangle

    @classmethod
    def draw(cls, rng, scale, augment="basic"):
        """A random one of AUGMENTATIONS; the area of its crop is within `scale` of the picture's."""
        # The order of the draws is part of every training sample: another order makes other samples.
        view = cls(moment=rng.random())
        if augment == "none":
            return view
        area = rng.uniform(*scale)
        aspect = math.exp(rng.uniform(-0.288, 0.288))  # 3/4 .. 4/3
        view.width = min(1.0, math.sqrt(area * aspect))
        view.height = min(1.0, math.sqrt(area / aspect))
        view.x, view.y = rng.random(), rng.random()
        view.flip = rng.random() < 0.5
        if augment == "strong":
            view.mode = "bilinear"
            view.operations = draw_operations(rng)
            view.jitter = tuple(rng.uniform(0.6, 1.4, 3).tolist())
            view.erased = draw_rectangle(rng)
        return view

    def box(self, H, W):
        """The rows and columns that it shows of a picture (H, W)."""
        h = max(1, round(H * (self.height or min(1.0, W / H))))
        w = max(1, round(W * (self.width or min(1.0, H / W))))
        top = round((H - h) * self.y)
        left = round((W - w) * self.x)
        return slice(top, top + h), slice(left, left + w)

    def crop(self, x, size):
        """(B, C, H, W), uint8 or float -> (B, C, size, size) of the same kind, antialiased."""
        rows, columns = self.box(*x.shape[-2:])
        return self.resize(x[..., rows, columns], size)

    def resize(self, x, size):
        """What was cropped, (B, C, h, w) -> (B, C, size, size), flipped where the view is."""
        # The crop becomes a square, whatever its shape: a change of aspect is part of the augmentation.
        x = F.interpolate(x, (size, size), mode=self.mode, antialias=True, align_corners=False)
        return x.flip(-1) if self.flip else x

    def erase(self, x, value):
        """Fills its rectangle of (..., size, size), if it has one."""
        if self.erased:
            top, left, height, width = (round(part * x.shape[-1]) for part in self.erased)
            x[..., top : top + height, left : left + width] = value
        return x

    def start(self, duration, clip):
        """Where a clip begins in a recording (s): the same moment in a video's sound and pictures."""
        return self.moment * max(0.0, min(duration, self.seconds) - clip)


def train_image(x, config, rng, view):
    size = config.input_shape[-1]
    x = x if isinstance(x, Image.Image) else Image.fromarray(x)
    x = torch.from_numpy(pixels(x, view.box, size)).permute(2, 0, 1)[None]  # (1, 3, h, w)
    return augment_frames(view.resize(x, size), config, view)[0]


def train_video(x, config, rng, view):
    """One clip of 2 s: (3, T, size, size)."""
    start = view.start(x.count / x.fps, CLIP_SECONDS)
    clip = x.frames(clip_frames(x, start, config.input_shape[1]))
    clip = view.crop(clip, config.input_shape[-1])  # in uint8, many times faster
    return augment_frames(clip, config, view).transpose(0, 1)


def augment_frames(x, config, view):
    """Cropped frames (T, 3, size, size) uint8 -> float, varied as the view says, all frames alike."""
    for name, strength in view.operations:
        x = torch.stack([operate(name, frame.permute(1, 2, 0), strength) for frame in x])
        x = x.permute(0, 3, 1, 2)
    x = x.float() / 255
    if view.jitter:
        x = colour_jitter(x, *view.jitter)
    return view.erase(normalise(x, config), 0.0)  # 0 is the mean colour


def train_audio(x, config, rng, view):
    """One log-mel clip (1, bins, frames), some of its bins masked."""
    seconds = clip_seconds(config)
    # Training hears the first channel. A sound shorter than a clip is taken whole.
    clip = cut_clip(x, view.start(seconds_of(x), seconds), seconds, 1)
    clip = log_mel(clip - clip.mean(), config)
    return mask_frequencies(clip, rng)


def mask_frequencies(clip, rng):
    """Sets a random band of (1, bins, frames) to the mean (SpecAugment, Park et al., 2019)."""
    bins = clip.shape[1]
    # Up to 12 of 128 bins, as in the paper; of fewer bins as large a share.
    width = int(rng.integers(0, 12 * bins // 128 + 1))
    low = int(rng.integers(0, bins - width + 1))
    clip[:, low : low + width] = 0.0
    return clip


def train_depth(x, config, rng, view):
    return normalise_depth(augment_map(x, config, view))


def train_map(x, config, rng, view):
    x = augment_map(x, config, view)
    return torch.where(x.isnan(), x.nanmean(), x)


def augment_map(x, config, view):
    """(H, W) -> (1, size, size), moved as the picture of its sample is; NaN where that shows nothing."""
    def crop(x):
        return view.crop(x[None, None], config.input_shape[-1])[0, 0]

    x = around_holes(torch.from_numpy(x), crop)
    for name, strength in view.operations:
        if name in MOVES:
            x = operate(name, x, strength)
    return view.erase(x[None], torch.nan)


def colour_jitter(x, brightness, contrast, saturation):
    """(T, 3, H, W) in 0..1 by three factors. Unlike the authors' other recipes, hue stays."""
    x = x * brightness
    # Contrast: away from the mean of all pixels, or towards it.
    mean = x.mean()
    x = mean + contrast * (x - mean)
    # Saturation: away from each pixel's own grey.
    grey = x.mean(dim=1, keepdim=True)  # (T, 1, H, W)
    return (grey + saturation * (x - grey)).clamp(0, 1)


def draw_rectangle(rng, probability=0.25, area=(0.02, 0.15)):
    """With some probability, the place of a rectangle in a picture (random erasing, Zhong et al., 2017)."""
    if rng.random() >= probability:
        return ()
    # Of that share of the picture, between 1 : 2.7 and 2.7 : 1
    share = rng.uniform(*area)
    aspect = math.exp(rng.uniform(-1.0, 1.0))
    height = math.sqrt(share * aspect)
    width = math.sqrt(share / aspect)
    return rng.uniform(0, 1 - height), rng.uniform(0, 1 - width), height, width


# Text and IMU are not varied: training reads them as evaluation does.
TRAINING = {
    "image": train_image,
    "video": train_video,
    "audio": train_audio,
    "depth": train_depth,
    "thermal": train_map,
}


# ---------------------------------------------------------------------------------------------
# Samples: the tensors of a source's items


class Bad(NamedTuple):
    """An item that could not be read, and why."""

    name: str
    reason: str


class Samples(torch.utils.data.Dataset):
    """Tensors of a source's items for encoder configs by modality; what cannot be read becomes Bad.

    Keys are an index (evaluation) or (number of the sample in the whole training, index): training's
    randomness depends on that number alone and not on the worker that happens to make the sample.
    With a cache (runtime/cache.py) it chooses one of the anchor's cached views, for all of the sample.
    """

    def __init__(self, source, configs, seed=0, cache=None, augment="basic"):
        self.source, self.configs, self.seed = source, configs, seed
        self.cache, self.augment = cache, augment

    def __len__(self):
        return len(self.source)

    def __getitem__(self, key):
        if not isinstance(key, tuple):
            return self.sample(key)
        number, index = key
        rng = np.random.default_rng([self.seed, number])
        # One View for the whole sample: a random one, or that of a cached embedding.
        if self.cache is None:
            return self.sample(index, rng, View.draw(rng, self.source.crop_scale, self.augment))
        cached = int(rng.integers(self.cache.views))
        _, view = cached_view(self.source, index, cached, self.augment)
        return self.sample(index, rng, view or View(moment=rng.random()), cached)

    def sample(self, index, rng=None, view=None, cached=None):
        """{modality: tensor, "index": index}, or Bad; `cached`: number of the anchor's view to look up."""
        sample = {"index": torch.tensor(index)}
        # An item that cannot be read is named and left out, never replaced by another.
        try:
            with errors_named(self.source.name(index)):
                # All are read first, because the shortest recording decides where a clip may begin.
                plain = {modality: self.source.open(index, modality) for modality in self.configs}
                if view:
                    view.seconds = min(map(seconds_of, plain.values()), default=math.inf)
                for modality, config in self.configs.items():
                    sample[modality] = self.tensor(plain.pop(modality), modality, config, rng, view)
                if cached is not None:
                    sample[self.cache.modality] = self.cache.look_up(index, cached)
        except DataError as error:
            return Bad(self.source.name(index), str(error))
        return sample

    def tensor(self, x, modality, config, rng, view):
        return transform(modality, x, config, rng, view)


def seconds_of(x):
    """Length of a waveform, a Sound or a Video; anything else has none."""
    if isinstance(x, (torch.Tensor, Sound)):
        return x.shape[1] / SAMPLE_RATE
    return x.count / x.fps if isinstance(x, Video) else math.inf


def cached_view(source, index, number, augment="basic"):
    """Random numbers and View of a cached view of an item; number 0 is evaluation's, without either."""
    if number == 0:
        return None, None
    rng = np.random.default_rng([index, number])
    return rng, View.draw(rng, source.crop_scale, augment)


# ---------------------------------------------------------------------------------------------
# Batches, and their order


def collate(samples):
    """Samples -> (batch of stacked tensors by modality, list of Bad); a batch of only Bad is None."""
    good = [sample for sample in samples if not isinstance(sample, Bad)]
    bad = [sample for sample in samples if isinstance(sample, Bad)]
    if not good:
        return None, bad
    batch = {key: torch.stack([sample[key] for sample in good]) for key in good[0]}  # (B, ...) each
    return batch, bad


def count_rows(source, pair):
    """How many rows have both modalities of a pair, and how many different items these rows are about."""
    if source.streamed:
        return len(source), len(source)
    _, items = source.items(*pair)
    items = items[items >= 0]
    return len(items), len(np.unique(items))


def batch_keys(source, batch_size, epochs, replicate=1.0, seed=0, start=0, rank=0, world=1, pair=()):
    """Keys of training batches for Samples: in each epoch about every row `replicate` times, in random order.

    No item is twice in a global batch, where each copy would be a negative of the other; of a pair, the rows
    that have both modalities are drawn. A process takes every world-th row of each global batch; of a
    streamed source, as many of its own. The first `start` batches are skipped, which is how a run resumes.
    """
    if source.streamed:
        share = len(range(rank, batch_size, world))
        last = epochs * (int(len(source) * replicate) // batch_size)
        batches = source.training_batches(pair, share, seed, start, rank, world)
        batches = itertools.islice(batches, max(0, last - start))
    else:
        batches = row_batches(source, batch_size, epochs, replicate, seed, start, pair)
        batches = (batch[rank::world] for batch in batches)
    for number, batch in enumerate(batches, start):
        # Every draw of a run has its own number, and so its own augmentation.
        numbers = range(number * batch_size + rank, (number + 1) * batch_size, world)
        yield list(zip(numbers, batch))


def row_batches(source, batch_size, epochs, replicate, seed, start, pair):
    """Global batches of rows, from batch `start` on; what does not fill a batch is left out of an epoch."""
    indices, items = source.items(*pair)
    rows = indices[items >= 0]
    # None, where there are fewer items than a batch needs.
    batches = int(len(rows) * replicate) // batch_size * (count_rows(source, pair)[1] >= batch_size)
    # An epoch that was trained before a resume costs nothing.
    for epoch in range(start // max(1, batches), epochs):
        passes = random_passes(rows, np.random.default_rng([seed, epoch]))
        of_epoch = batches_of_items(passes, items, batch_size)
        yield from itertools.islice(of_epoch, max(0, start - epoch * batches), batches)


def random_passes(rows, rng):
    """All rows in random order, again and again."""
    while True:
        yield from rng.permutation(rows).tolist()


def batches_of_items(rows, items, batch_size):
    """Batches from a stream of rows; a row whose item is in the batch already waits for the next.

    items: the item of each row. The stream has at least batch_size different ones.
    """
    waiting = {}  # item: its rows
    while True:
        batch = {}  # item: row
        # Who waits comes first.
        for item in list(waiting)[:batch_size]:
            batch[item] = waiting[item].pop()
            if not waiting[item]:
                del waiting[item]
        while len(batch) < batch_size:
            row = next(rows)
            if items[row] in batch:
                waiting.setdefault(items[row], []).append(row)
            else:
                batch[items[row]] = row
        yield list(batch.values())


if __name__ == "__main__":
    from examples.look import main

    main()

"""Sound while the answer is still being written: the flow and HiFT, chunk by chunk, without seams.

A chunk is a whole number of 5-token groups. The flow continues the mel it made before (as its
prompt) and sees one group further than it speaks. HiFT sees the same border frames twice, once
with the provisional mel of that further group and once with the final one, and fades from the one
wave to the other; its source goes on in phase, so both waves agree. The whole-utterance synthesis
is the same code with a single chunk.
"""

import torch

from aqaa.config import GROUP_SIZE


class WaveStream:
    """HiFT over a mel that grows: `push(mel)` returns the samples that are settled.

    context: mel frames of the past that are run again (more than the network's reach changes
    nothing). fade: frames over which two versions of a border are blended.
    """

    def __init__(self, hift, *, context=24, fade=4, seed=0):
        self.hift = hift
        self.context = context
        self.fade = fade
        self.state = hift.m_source.start(seed)
        empty = hift.window.new_zeros(1, hift.config.in_channels, 0)
        self.mel = empty  # (1, n_mels, <= context + fade) frames that must be seen again
        self.past = 0  # how many of them have been spoken
        self.source = empty[:, :1]  # (1, 1, past * hop) what the source gave for those
        self.held = empty[0, 0]  # (fade * hop,) a first version of the samples that come next

    @torch.inference_mode()
    def push(self, mel, ahead=None, final=False):
        """mel (1, n_mels, T) final frames; ahead (1, n_mels, P) a guess at the next -> (N,) sound.

        Without enough `ahead` the last `fade` frames wait for the next call. `final` speaks all.
        """
        mel = torch.cat([self.mel, mel], 2)
        settled = mel.shape[2]
        seen = mel if ahead is None or final else torch.cat([mel, ahead.to(mel)], 2)
        past = self.past
        # a border needs `fade` frames beyond it, whose samples the next call blends with its own
        end = settled if final else max(past, min(settled, seen.shape[2] - self.fade))
        if end == past:
            self.mel = mel
            return mel.new_zeros(0)
        hop = self.hift.hop
        f0 = self.hift.f0_predictor(seen)  # (1, T + P)
        source = [self.source, self.hift.source(f0[:, past:end], self.state)]
        if seen.shape[2] > end:  # the next call makes this part anew: the state must not move
            source.append(self.hift.source(f0[:, end:], self.state.copy()))
        source = torch.cat(source, 2)  # (1, 1, (T + P) * hop)
        wave = self.hift.decode(seen, source)[0]
        out = self._blend(wave[past * hop : end * hop])
        # keep what the next call has to see again
        self.held = wave[end * hop : (end + self.fade) * hop]
        start = max(0, end - self.context)
        self.mel = mel[..., start:]
        self.source = source[..., start * hop : end * hop]
        self.past = end - start
        return out

    def _blend(self, wave):
        """Fade from the samples that were held back to the same ones made with more ahead."""
        n = min(len(self.held), len(wave))
        rise = torch.sin(torch.linspace(0, torch.pi / 2, n, device=wave.device)) ** 2
        faded = self.held[:n] + rise * (wave[:n] - self.held[:n])
        return torch.cat([faded, wave[n:]])


class StreamingVocoder:
    """One utterance: `push(ids)` returns samples that are ready (often none), `finish()` the rest.

    chunks: groups spoken in the first, second … chunk, the last number repeating; look_ahead:
    groups that must be known beyond a chunk; look_back: groups of the past that the flow continues.
    prompt_token (1, P), prompt_feat (1, T, n_mels), embedding (1, spk_embed_dim): the voice, where
    the flow takes one; every chunk sees them. The sound depends on ids and seed alone, not on how
    the ids were divided among pushes. Raises ValueError for chunks without a group.
    """

    def __init__(
        self, flow, hift, *, chunks=(2, 4, 8), look_ahead=1, look_back=8, seed=0,
        prompt_token=None, prompt_feat=None, embedding=None, n_timesteps=None, temperature=None,
        cfg_rate=None,
    ):  # fmt: skip
        if not chunks or min(chunks) < 1 or min(look_ahead, look_back) < 0:
            limits = "one or more groups each, look_ahead and look_back 0 or more"
            raise ValueError(f"chunks must be {limits}.")
        self.flow = flow
        self.chunks = chunks
        self.look_ahead = look_ahead
        self.look_back = look_back
        self.options = {"embedding": embedding, "cfg_rate": cfg_rate}
        self.options |= {"n_timesteps": n_timesteps, "temperature": temperature}
        weight = flow.encoder_proj.weight
        self.device = weight.device
        # ids that the next chunk continues (1, N), and their mel (1, frames, n_mels)
        self.past = torch.zeros(1, 0, dtype=torch.long, device=self.device)
        self.mel = weight.new_zeros(1, 0, flow.config.output_size)
        self.prompt = (self.past, self.mel)
        if prompt_token is not None:
            self.prompt = (prompt_token.to(self.device), prompt_feat.to(weight))
        self.generator = torch.Generator().manual_seed(seed)
        self.prompt_noise = torch.randn(self.prompt[1].shape, generator=self.generator)
        self.noise = self.prompt_noise[:, :0]  # (1, frames, n_mels), beginning where `mel` begins
        self.wave = WaveStream(hift, seed=seed)
        self.waiting = []  # ids not yet spoken
        self.spoken = 0  # tokens
        self.count = 0  # chunks spoken

    def push(self, ids):
        """ids: 0-based audio ids, in groups of five (2 linguistic, 3 semantic) -> (N,)."""
        self.waiting += [int(i) for i in ids]
        pieces = [torch.zeros(0, device=self.device)]
        while True:
            groups = self.chunks[min(self.count, len(self.chunks) - 1)]
            if len(self.waiting) < (groups + self.look_ahead) * GROUP_SIZE:
                return torch.cat(pieces)
            pieces.append(self._speak(groups, self.look_ahead))

    def finish(self):
        """Speak what is left; an incomplete group is dropped. Returns (N,) samples."""
        return self._speak(len(self.waiting) // GROUP_SIZE, 0, final=True)

    def _speak(self, groups, ahead, final=False):
        """Speak `groups` groups, looking at `ahead` more -> (N,) samples."""
        n = groups * GROUP_SIZE
        if not n:
            return self.wave.push(self.mel[:, :0].mT.float(), None, final)
        waiting = self.waiting[: n + ahead * GROUP_SIZE]
        token = torch.tensor([waiting], device=self.device)  # (1, N)
        past = torch.cat([self.prompt[0], self.past], 1)
        past_mel = torch.cat([self.prompt[1], self.mel], 1)
        # a frame that is made again keeps its noise, so that both versions agree
        frames = self.mel.shape[1] + self._frames(self.spoken, self.spoken + token.shape[1])
        missing = max(0, frames - self.noise.shape[1])
        fresh = torch.randn(1, missing, self.mel.shape[2], generator=self.generator)
        self.noise = torch.cat([self.noise, fresh], 1)
        noise = torch.cat([self.prompt_noise, self.noise[:, :frames]], 1).mT  # (1, n_mels, frames)
        made = self.flow.inference(  # (1, n_mels, frames)
            token, prompt_token=past, prompt_feat=past_mel, noise=noise.to(self.device),
            first=self.spoken, **self.options,
        )  # fmt: skip
        frames = self._frames(self.spoken, self.spoken + n)
        mel = made[..., :frames]
        self.waiting = self.waiting[n:]
        self.spoken += n
        self.count += 1
        # keep the last look_back groups, ids and mel, as the prompt of the next chunk
        keep = min(self.look_back * GROUP_SIZE, self.spoken)
        self.past = torch.cat([self.past, token[:, :n]], 1)
        self.past = self.past[:, self.past.shape[1] - keep :]
        self.mel = torch.cat([self.mel, mel.mT], 1)
        begin = self.mel.shape[1] - self._frames(self.spoken - keep, self.spoken)
        self.mel = self.mel[:, begin:]
        self.noise = self.noise[:, begin:]
        return self.wave.push(mel.float(), made[..., frames:].float(), final)

    def _frames(self, start, end):
        """Mel frames of the utterance's tokens start … end - 1."""
        return self.flow.frames(end) - self.flow.frames(start)


class Vocoder:
    """Flow and HiFT together; options are those of StreamingVocoder."""

    def __init__(self, flow, hift, **options):
        self.flow = flow
        self.hift = hift
        self.options = options

    @property
    def sample_rate(self):
        return self.hift.config.sampling_rate

    def stream(self, seed=0, **more):
        """A StreamingVocoder for one utterance."""
        return StreamingVocoder(self.flow, self.hift, seed=seed, **self.options | more)

    def synthesize(self, ids, seed=0):
        """0-based ids of a whole utterance -> (N,) samples; N is frames(len(ids)) * hop."""
        whole = self.stream(seed, chunks=(float("inf"),))  # one chunk, which `finish` speaks
        whole.push(ids)
        return whole.finish()

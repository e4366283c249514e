"""Sound while the answer is still being written: the flow and HiFT, chunk by chunk, without seams.

A chunk is a whole number of 5-token groups. The flow continues the mel it made before (as its prompt) and sees one
group further than it speaks. HiFT sees the same border frames twice, once with the provisional mel of that further
group and once with the final one, and fades from the one wave to the other; its source goes on in phase, so both
waves agree. The whole-utterance synthesis is the same code with a single chunk.
"""

import torch

from aqaa.config import GROUP_SIZE


class WaveStream:
    """HiFT over a mel that grows: `push(mel)` returns the samples that are settled.

    context: mel frames of the past that are run again (more than the network's reach changes nothing). fade: frames
    over which two versions of a border are blended. Pitch phase and noise are carried in a SourceState.
    """

    def __init__(self, hift, *, context=24, fade=4, seed=0):
        self.hift, self.context, self.fade = hift, context, fade
        self.state = hift.m_source.start(seed)
        self.mel = None  # (1, n_mels, <= context + fade) frames that must be seen again
        self.past = 0  # how many of them have been spoken
        self.source = None  # (1, 1, past * hop) what the source gave for those
        self.held = None  # (fade * hop,) a first version of the samples that come next

    @torch.inference_mode()
    def push(self, mel, ahead=None, final=False):
        """mel (1, n_mels, T) final frames; ahead (1, n_mels, P) a guess at those that follow -> samples (N,).

        Without enough `ahead` the last `fade` frames wait for the next call. `final` speaks everything.
        """
        mel = mel if self.mel is None else torch.cat([self.mel, mel], 2)
        settled = mel.shape[2]
        seen = mel if ahead is None or final else torch.cat([mel, ahead.to(mel)], 2)
        end = settled if final else max(self.past, min(settled, seen.shape[2] - self.fade))
        if end == self.past:
            self.mel = mel
            return mel.new_zeros(0)
        hop, past = self.hift.hop, self.past
        f0 = self.hift.f0_predictor(seen)
        source = [] if self.source is None else [self.source]
        source.append(self.hift.source(f0[:, past:end], self.state))
        if seen.shape[2] > end:  # a continuation that the next call will make anew
            source.append(self.hift.source(f0[:, end:], self.state.copy()))
        source = torch.cat(source, 2)
        wave = self.hift.decode(seen, source)[0]
        out = self._blend(wave[past * hop : end * hop])
        self.held = wave[end * hop : (end + self.fade) * hop]
        start = max(0, end - self.context)
        self.mel, self.source, self.past = mel[..., start:], source[..., start * hop : end * hop], end - start
        return out

    def _blend(self, wave):
        n = 0 if self.held is None else min(len(self.held), len(wave))
        if n:
            rise = torch.sin(torch.linspace(0, torch.pi / 2, n, device=wave.device)) ** 2
            wave = torch.cat([self.held[:n] + rise * (wave[:n] - self.held[:n]), wave[n:]])
        return wave


class StreamingVocoder:
    """One utterance: `push(ids)` returns the samples that are ready (often none), `finish()` the rest.

    chunks: groups spoken in the first, second … chunk, the last number repeating; look_ahead: groups that must be known
    beyond a chunk; look_back: groups of the past that the flow continues. prompt_token (1, P), prompt_feat
    (1, T, n_mels) and embedding (1, spk_embed_dim) are the voice, where the flow takes one; every chunk sees them.
    What comes out depends on ids and seed alone, not on how the ids were divided among pushes. Raises ValueError for
    chunks without a group.
    """

    def __init__(self, flow, hift, *, chunks=(2, 4, 8), look_ahead=1, look_back=8, seed=0, prompt_token=None,
                 prompt_feat=None, embedding=None, n_timesteps=None, temperature=None, cfg_rate=None):
        if not chunks or min(chunks) < 1 or min(look_ahead, look_back) < 0:
            raise ValueError("chunks must be one or more groups each, look_ahead and look_back 0 or more.")
        self.flow, self.chunks, self.look_ahead, self.look_back = flow, chunks, look_ahead, look_back
        self.options = {"embedding": embedding, "n_timesteps": n_timesteps, "temperature": temperature,
                        "cfg_rate": cfg_rate}
        weight = flow.encoder_proj.weight
        self.device, n_mels = weight.device, flow.config.output_size
        self.past = torch.zeros(1, 0, dtype=torch.long, device=self.device)  # ids that the next chunk continues
        self.mel = weight.new_zeros(1, 0, n_mels)  # and their mel
        self.prompt = (self.past, self.mel)
        if prompt_token is not None:
            self.prompt = (prompt_token.to(self.device), prompt_feat.to(weight))
        self.generator = torch.Generator().manual_seed(seed)
        self.prompt_noise = torch.randn(self.prompt[1].shape, generator=self.generator)
        self.noise = self.prompt_noise[:, :0]  # (1, frames, n_mels), beginning where `mel` begins
        self.wave = WaveStream(hift, seed=seed)
        self.waiting, self.spoken, self.count = [], 0, 0  # ids not yet spoken; tokens spoken; chunks spoken

    def push(self, ids):
        """ids: 0-based audio ids, in groups of five (linguistic, linguistic, semantic, semantic, semantic) -> (N,)."""
        self.waiting += [int(i) for i in ids]
        pieces = []
        while True:
            groups = self.chunks[min(self.count, len(self.chunks) - 1)]
            if len(self.waiting) < (groups + self.look_ahead) * GROUP_SIZE:
                return torch.cat(pieces) if pieces else torch.zeros(0, device=self.device)
            pieces.append(self._speak(groups, self.look_ahead))

    def finish(self):
        """Speak what is left; an incomplete group is dropped. Returns (N,) samples."""
        return self._speak(len(self.waiting) // GROUP_SIZE, 0, final=True)

    def _speak(self, groups, ahead, final=False):
        n, total = groups * GROUP_SIZE, (groups + ahead) * GROUP_SIZE
        mel, guess = self.mel[:, :0].mT, None
        if n:
            token = torch.tensor([self.waiting[:total]], device=self.device)
            before = [torch.cat(pair, 1) for pair in zip(self.prompt, (self.past, self.mel), strict=True)]
            made = self.flow.inference(token, prompt_token=before[0], prompt_feat=before[1], first=self.spoken,
                                       noise=self._noise(token.shape[1]), **self.options)
            frames = self.flow.frames(self.spoken + n) - self.flow.frames(self.spoken)
            mel, guess = made[..., :frames], made[..., frames:]
            self._remember(token[:, :n], mel)
            self.waiting, self.spoken, self.count = self.waiting[n:], self.spoken + n, self.count + 1
        return self.wave.push(mel.float(), None if guess is None else guess.float(), final)

    def _noise(self, n_tokens):
        """Noise for prompt, past and coming frames. A frame made again keeps its noise, so that both versions agree."""
        frames = self.mel.shape[1] + self.flow.frames(self.spoken + n_tokens) - self.flow.frames(self.spoken)
        fresh = torch.randn(1, max(0, frames - self.noise.shape[1]), self.mel.shape[2], generator=self.generator)
        self.noise = torch.cat([self.noise, fresh], 1)
        return torch.cat([self.prompt_noise, self.noise[:, :frames]], 1).mT.to(self.device)

    def _remember(self, token, mel):
        """Keep the last look_back groups, ids and mel, as the prompt of the next chunk."""
        end = self.spoken + token.shape[1]
        keep = min(self.look_back * GROUP_SIZE, end)
        frames = self.flow.frames(end) - self.flow.frames(end - keep)
        past, mel = torch.cat([self.past, token], 1), torch.cat([self.mel, mel.mT], 1)
        self.noise = self.noise[:, mel.shape[1] - frames :]
        self.past, self.mel = past[:, past.shape[1] - keep :], mel[:, mel.shape[1] - frames :]


class Vocoder:
    """Flow and HiFT together; options are those of StreamingVocoder."""

    def __init__(self, flow, hift, **options):
        self.flow, self.hift, self.options = flow, hift, options

    @property
    def sample_rate(self):
        return self.hift.config.sampling_rate

    def stream(self, seed=0):
        """A StreamingVocoder for one utterance."""
        return StreamingVocoder(self.flow, self.hift, seed=seed, **self.options)

    def synthesize(self, ids, seed=0):
        """0-based audio ids of a whole utterance -> (N,) samples; N is frames(len(ids)) * hop."""
        whole = StreamingVocoder(self.flow, self.hift, seed=seed, **self.options | {"chunks": (float("inf"),)})
        whole.push(ids)
        return whole.finish()

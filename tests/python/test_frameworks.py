# Copyright 2026 The fusestep authors
# SPDX-License-Identifier: Apache-2.0
"""Training loops of others: what they train with our class, with torch's, and when they resume.

In float64, where our rounding and torch's differ by too little for training to amplify it beyond 1e-9.
"""

import pytest
import torch

import fusestep
import support

STEPS = 12


def samples(count=4 * STEPS, features=6):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, features, generator=random, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, x.sin().sum(1, keepdim=True))


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1)).double()


def optimizer_and_schedule(cls, model):
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = cls([{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=0.01)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def values(model):
    return [p.detach().clone() for p in model.parameters()]


def check(train, tmp_path):
    """`train(cls, folder, resumes)` gives values and optimizer after STEPS steps; resumed, after the last half."""
    whole, optimizer = train(fusestep.optim.AdamW, tmp_path / "ours", False)
    support.stepped_by_us(optimizer, steps=STEPS)
    resumed, again = train(fusestep.optim.AdamW, tmp_path / "ours", True)
    support.stepped_by_us(again, steps=STEPS // 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    torchs, _ = train(torch.optim.AdamW, tmp_path / "torch", False)
    torch.testing.assert_close(whole, torchs, rtol=1e-9, atol=1e-9)
    # A run that torch began goes on with us.
    switched, _ = train(fusestep.optim.AdamW, tmp_path / "torch", True)
    torch.testing.assert_close(switched, torchs, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, cls):
            super().__init__()
            self.net, self.cls = net(), cls

        def training_step(self, batch, _):
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer, schedule = optimizer_and_schedule(self.cls, self.net)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trainer(folder, epochs):
        return lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=epochs,
            gradient_clip_val=1.0,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def train(cls, folder, resumes):
        module, loader = Module(cls), torch.utils.data.DataLoader(samples(), batch_size=8)
        if not resumes:
            first = trainer(folder, 1)
            first.fit(Module(cls), loader)
            first.save_checkpoint(folder / "half.ckpt")
        runs = trainer(folder, 2)
        runs.fit(module, loader, ckpt_path=folder / "half.ckpt" if resumes else None)
        optimizer = runs.optimizers[0]
        assert type(optimizer) is cls
        return values(module), optimizer

    check(train, tmp_path)


def test_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate")

    def train(cls, folder, resumes):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = net()
        optimizer, schedule = optimizer_and_schedule(cls, model)
        loader = torch.utils.data.DataLoader(samples(8 * STEPS), batch_size=4)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        accelerator.register_for_checkpointing(schedule)
        if resumes:
            accelerator.load_state(folder)
            loader = accelerator.skip_first_batches(loader, STEPS)
        for count, (x, y) in enumerate(loader, STEPS if resumes else 0):
            if count == STEPS and not resumes:
                accelerator.save_state(folder)
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        assert type(optimizer.optimizer) is cls
        return values(model), optimizer.optimizer

    check(train, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_transformers_trainer(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        embd_pdrop=0,
        attn_pdrop=0,
        resid_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    ids = torch.randint(0, 11, (4 * STEPS, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in ids]

    def train(cls, folder, resumes):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).double()
        optimizer, schedule = optimizer_and_schedule(cls, model)
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if resumes else None)
        assert type(optimizer) is cls
        return values(model), optimizer

    check(train, tmp_path)

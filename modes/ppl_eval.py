"""mode=ppl_eval: the unweighted likelihood bound of a checkpoint on a data set."""

from pathlib import Path

from omegaconf import DictConfig

from callbacks.progress import progress_bar
from data.grammar_model import ProbabilisticGrammar
from evaluation.perplexity import (
    gap_to_truth,
    likelihood_metrics,
    true_nll,
    write_likelihoods,
)
from evaluation.tables import metrics_table
from opening import evaluation_data, open_checkpoint
from runtime.checkpoint import provenance
from runtime.overrides import overridden_keys
from runtime.run import write_config, write_provenance
from runtime.trainer import build_trainer


def run(cfg: DictConfig) -> dict[str, float]:
    """Evaluate `eval.checkpoint_path` on `eval.split` with `eval.num_draws` draws per row.

    The model, its data and tokenizer are the checkpoint's, unless overridden; another data set
    (data=ptb) is read with the checkpoint's tokenizer. Exact for AR and for blocks of one token.

    Returns:
        nll (nats per token), its standard errors, ppl, bpd; unigram_ppl for comparison; on
        `data=grammar` also the true value and the gap to it; and what else the algorithm logs of a
        validation (block_exact, token_accuracy and tokens_per_pass of models of blocks).
    """
    model, cfg = open_checkpoint(cfg)
    data = evaluation_data(
        cfg, model.tokenizer, named="data.tokenizer_name_or_path" in overridden_keys()
    )
    model.eval_draws = 1 if model.is_exact else cfg.eval.num_draws
    trainer = build_trainer(cfg, logger=False, callbacks=[progress_bar()], limit_val_batches=None)
    data.trainer = trainer
    loader = data.eval_loader(cfg.eval.split, cfg.eval.limit_rows)
    trainer.validate(model, dataloaders=loader, verbose=False)
    rows = model.evaluated
    assert rows is not None, "validation leaves its rows"
    index_R, nll_RK, tokens_R = (column.numpy() for column in rows)
    run_dir = Path(cfg.paths.run_dir)
    if trainer.is_global_zero:
        write_config(run_dir, cfg)
        write_likelihoods(run_dir / "likelihoods.jsonl", index_R, nll_RK, tokens_R)
        write_provenance(run_dir, provenance(cfg, data.fingerprint))
    metrics = likelihood_metrics(nll_RK, tokens_R, model.is_exact)
    metrics |= data.unigram_metrics(cfg.eval.split)
    # What the algorithm counts beside the likelihood, such as the blocks that refinement finds.
    counted = {name.removeprefix("val/"): x.item() for name, x in trainer.callback_metrics.items()}
    metrics |= {name: x for name, x in counted.items() if name not in (*metrics, "nll_se")}
    if isinstance(data.source, ProbabilisticGrammar):
        texts = data.texts_of_rows(cfg.eval.split, index_R)
        metrics |= gap_to_truth(nll_RK, tokens_R, true_nll(texts, data.source))
        metrics["entropy"] = data.source.entropy_per_token()
    if trainer.is_global_zero:
        print(metrics_table(f"{cfg.data.name} {cfg.eval.split}", metrics))
    return metrics

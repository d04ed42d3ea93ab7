"""Training: one loop for every model here. A task says what is trained; the engine does the rest.

TaskConfig (YAML) -> Task: objective, loader, samples, validate, export
                      |
    run.main -> loop.Trainer: accumulate, clip, step, average, log, save

<out>/config.yaml                    the resolved configuration; a resumed run is held to it
<out>/log.jsonl                      one line a record: training means, validation numbers, events
<out>/checkpoints/step-00001000/     torch.distributed.checkpoint files and checkpoint.json (sizes, hashes)
<out>/samples/step-00001000-*.png    the task's pictures
<out>/bundle/                        the averaged weights as a plain bundle, without any training state
<out>/nonfinite/                     the batch of a step that was not finite
"""

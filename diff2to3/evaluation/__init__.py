"""Benchmarks over assets: any method, any truth, one engine. A module imports only modules above it.

    protocol.py   what is rendered and compared, as a file; which assets, cameras and seeds
    assets.py     which assets a program scores: folders and zips, of one split; their packs
    runs.py       the folder of a run: resumable, shared by processes, never emptied by an error
    parallel.py   worker processes, which may die, with a bar
    shapes.py     points and voxels of an object, and how far they are from the asset's
    subjects.py   an asset as methods get it; what a source is, and what it shows
    models.py     sources: our generator from the photo, our autoencoder from the mesh
    sources.py    sources: .ply folders, picture folders, meshes, a function; ``open_source`` by name
    retrieval.py  sources: the training asset that looks most like the photo, random training assets
    scores.py     metrics: the numbers of one object, and the features of sets
    engine.py     a plan (protocol, truth, methods, metrics) over assets
    summary.py    means with intervals, paired differences, FD and KD over a run
    tables.py     one method's table as JSON and Markdown, the paper's rows beside ours
    gate.py       a table against an earlier one
    report.py     HTML with pictures side by side
    results.py    a model's result on folders of assets: means, by pack, the worst, baselines
    cli.py        what the programs in eval/ share
    recognition.py      photos against the assets that were made of them
    recognition_run.py  what eval/recognition.py works through
    photo_frame.py      an asset of one photograph beside the true one, in the photograph's frame
    photo_frame_run.py  what eval/photo_frame.py works through

To add a method or a truth, write a frozen dataclass of plain values that derives from ``ObjectSource`` and has
``name``, ``fingerprint`` and ``make(subject)``, which returns Gaussians, or ``Made`` with facts about them. One that
has no object derives from ``Source`` and has ``pictures``. What a source loads is a ``cached_property``: worker
processes get its values and load on their own. A truth without meshes, such as a folder of photos, lists its ``ids``,
gives the photo (``photo=True``) and pictures, and leaves ``mesh`` as it is. A line in ``sources.open_source`` names it
for --method.

To add a metric, write a frozen dataclass that derives from ``Metric`` and has ``values(subject, source, shown)``, or
``features`` for numbers over sets, and a row in ``summary.METRICS`` with its heading, direction and digits. A number
that needs no truth can be a fact of the source.

To add a program, parse arguments (``cli.add_benchmark_arguments`` or ``cli.add_model_arguments``), make a ``Plan``,
and call ``cli.score_method``, which writes a run's folder with a table, or ``engine.run_plan`` within
``runs.unfinished_run`` for one result file. eval/compare.py and eval/reconstruction.py are the shortest.
"""

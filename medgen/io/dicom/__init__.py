"""DICOM in and out: strict about what it reads, sparing with what it writes.

Start at `read` (`find_series`, `read_series`, `series_header`) or at `write` (`write_series`, `Provenance`).

    in    find        which series lie in a set of files, told by content
          file        one file parsed with distrust: bounded, nothing decoded
          elements    the few header values medgen reads
          mosaic      Siemens mosaics: where the slices tiled into one picture lie
          frames      what each frame says of itself: place, rescale, what tells it from its twins
          series      frames sorted into one regular grid, or refused with the reason
          decode      the pictures of one file as stored integers
          jpeg        JPEG that only SimpleITK decodes safely, and the size a codestream states
          voxels      one array of all frames; padding, repairs, units
          read        the steps above, from a Source to a Scan

    out   provenance  what an output says of its making
          origin      what is taken over from the source files: a short list
          values      single values that are valid whatever goes in
          pixels      a scan's values as 16-bit integers and what they mean
          place       orientation, position and spacing of slices
          modules     the attribute groups of the standard, one function each
          write       the steps above, from a Scan to files
"""

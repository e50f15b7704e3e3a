//! The contents of a file without reading it whole: mapped into memory.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Bytes of a file that is mapped, or of memory.
#[derive(Debug)]
pub(crate) enum FileBytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Maps a file. Only what is looked at is read, and it takes no memory of the process's own.
    #[expect(
        unsafe_code,
        reason = "a file that is cut short while it is mapped ends the process by a signal, which no API can rule out; it is what every reader \
                  of model files accepts, and the alternative is to copy files of hundreds of gigabytes"
    )]
    pub(crate) fn map(path: &Path) -> Result<Self> {
        let failed = |source| Error::File {
            path: path.to_owned(),
            source,
        };
        let file = File::open(path).map_err(failed)?;
        // Nothing can be mapped of an empty file.
        if file.metadata().map_err(failed)?.len() == 0 {
            return Ok(Self::Owned(Vec::new()));
        }
        // SAFETY: the mapping is read-only and private to this process. What another process does to the file meanwhile can change
        // bytes that were checked before: they are numbers of tensors alone, as the headers were copied out when they were parsed.
        let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
        Ok(Self::Mapped(map))
    }
}

impl From<Vec<u8>> for FileBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Owned(bytes)
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

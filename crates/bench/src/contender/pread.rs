//! pread: each access reads its page from a file.

use super::{Contender, per_access, per_fault, timed};
use crate::error::Trouble;
use crate::file::{DataFile, word_of};
use crate::spec::{Metric, Sample, Spec, Work};
use crate::workload::{self, PAGE_BYTES, Places};
use peerspace_os::own::Buffer;

/// A file, and a page to read into.
#[derive(Debug)]
pub(super) struct Pread {
    file: DataFile,
    page: Buffer,
    places: Places,
}

impl Pread {
    pub(super) fn new(spec: &Spec) -> Result<Pread, Trouble> {
        let file = DataFile::new(&spec.dir, spec.data)?;
        let page = Buffer::new(PAGE_BYTES).map_err(Trouble::failed("map a buffer"))?;
        Ok(Pread { places: Places::new(file.pages()), file, page })
    }

    pub(super) fn mode(&self) -> &'static str {
        self.file.mode()
    }
}

impl Contender for Pread {
    fn perform(&mut self, work: Work) -> Result<Sample, Trouble> {
        let Work::Random { accesses } = work else {
            return Err(Trouble::Failed("it reads at random only".into()));
        };
        let Pread { file, page, places } = self;
        let sample = timed(
            || {
                for _ in 0..accesses {
                    let (at, k) = places.next();
                    file.read_page(page, (at * PAGE_BYTES) as u64).map_err(Trouble::failed("read the file"))?;
                    workload::check(at, k, word_of(page, k))?;
                }
                Ok(accesses)
            },
            |time| per_access(time, accesses),
        )?;
        // Each access fetches.
        let each = sample.metrics[&Metric::PerAccess];
        Ok(per_fault(sample, each))
    }
}

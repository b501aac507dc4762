//! memcpy: all data in RAM, copied block by block into a window as large as the others' RAM, and read there. What
//! moving the same bytes costs when nobody has to ask for them.

use super::{Contender, throughput, timed};
use crate::error::Trouble;
use crate::spec::{Sample, Spec, Work};
use crate::workload;

const BLOCK: usize = (2 << 20) / 8;

/// The data, and the window.
#[derive(Debug)]
pub(super) struct Copy {
    data: Vec<u64>,
    window: Vec<u64>,
}

impl Copy {
    pub(super) fn new(spec: &Spec) -> Result<Copy, Trouble> {
        let mut data = vec![0; spec.data as usize / 8 / BLOCK * BLOCK];
        workload::fill(&mut data, 0);
        Ok(Copy { data, window: vec![1; spec.host as usize / 8 / BLOCK * BLOCK] })
    }
}

impl Contender for Copy {
    fn perform(&mut self, work: Work) -> Result<Sample, Trouble> {
        if work != Work::Sequential {
            return Err(Trouble::Failed("it copies in order only".into()));
        }
        let bytes = size_of_val(&self.data[..]) as f64;
        let (data, window) = (&self.data, &mut self.window);
        timed(
            || {
                let mut read = 0;
                for (i, block) in data.chunks_exact(BLOCK).enumerate() {
                    let at = i * BLOCK % window.len();
                    let copy = &mut window[at..at + BLOCK];
                    copy.copy_from_slice(block);
                    read += workload::read_in_order(copy, i * BLOCK)?;
                }
                Ok(read)
            },
            |time| throughput(time, bytes),
        )
    }
}

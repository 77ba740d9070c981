package render

import (
	"io"

	"github.com/nftrace/nftrace/pkg/events"
)

// Renderer prints one journey after the other. It is not safe for use by several
// goroutines at once. [NewTree], [NewTrace] and [NewJSON] make one.
type Renderer interface {
	// Append adds a journey's text to b, which may hold those before: nothing is copied
	// once more to be written.
	Append(b []byte, j *events.Journey) []byte
}

// TraceOptions say whose lines [NewTrace] prints. The zero value is for kernels before Linux 6.15.
type TraceOptions struct {
	// AE is set where the kernel knows the TCP flag of that name: it prints it then, and not
	// among the reserved bits.
	AE bool
}

// NewTrace returns a Renderer that prints what [Trace] does, for such a kernel.
func NewTrace(opts TraceOptions) Renderer {
	m := &logBuf{lines: new([1 << linesBits]lines), opts: opts}
	return renderer(m.appendTrace)
}

type renderer func([]byte, *events.Journey) []byte

func (r renderer) Append(b []byte, j *events.Journey) []byte { return r(b, j) }

// writeOnce writes b with one Write, or none where there is nothing to say.
func writeOnce(w io.Writer, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	n, err := w.Write(b)
	if err == nil && n < len(b) {
		err = io.ErrShortWrite
	}
	return err
}

package render

import (
	"io"

	"github.com/nftrace/nftrace/pkg/events"
)

// Renderer writes journeys, each with one Write. It is not safe for use by
// several goroutines at once. [NewTree], [NewTrace] and [NewJSON] make one. Errors are the writer's own (EPIPE …), unwrapped.
type Renderer interface {
	Journey(j *events.Journey) error
}

// NewTrace returns a Renderer that writes what [Trace] does.
func NewTrace(w io.Writer) Renderer {
	return &renderer{w: w, append: new(logBuf).appendTrace}
}

type renderer struct {
	w      io.Writer
	append func([]byte, *events.Journey) []byte
	buf    []byte
}

func (r *renderer) Journey(j *events.Journey) error {
	r.buf = r.append(r.buf[:0], j)
	return writeOnce(r.w, r.buf)
}

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

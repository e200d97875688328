/* executor.c - why no two stages ever wait for each other: a send waits only for the send before it
 * in the same direction, and a stage has a receive posted for every message that can come before it
 * gets to the step that needs it. One ahead is enough between neighbours. What goes around from the
 * last stage to the first is needed a whole group of microbatches later, of which num_stages are
 * spent on the way; the rest must find a place to wait. test_pipeline_executor.c runs it with sends
 * that complete only when they are received. */
#include "pipeline/executor.h"

#include <stdlib.h>

#include "base/check.h"

struct message {
    struct comm_handle handle;
    struct tensor tensor;
};

/* What a stage sends and receives in one direction. */
struct link {
    struct comm *comm;
    int from, to;
    int num_ahead;            /* receives under way while a step computes */
    int next_step;            /* of the schedule: the first whose receive is not posted */
    struct message *receives; /* [num_ahead + 1], a ring */
    int first_receive, num_receives;
    struct message send; /* the last; no data: none in flight */
};

/* Saved activations of one forward. */
struct slot {
    bool is_taken;
    struct pipeline_step holder;
    struct tensor input; /* no data: none */
};

struct walk {
    const struct pipeline_schedule *schedule;
    const struct pipeline_work *work;
    const struct pipeline_transport *transport;
    bool has_backward;
    struct slot *slots;
    struct link links[2];         /* by direction */
    struct tensor *free_boundary; /* tensors to be used again */
    int num_free_boundary, max_boundary;
};

/* ---- boundary tensors ---- */

/* They come from the arena when no old one is free. Which one is free when depends on the schedule
 * alone, so that the null device measures what training will take. */
static struct tensor boundary_take(struct walk *walk)
{
    const struct pipeline_transport *transport = walk->transport;

    if (walk->num_free_boundary > 0) {
        return walk->free_boundary[--walk->num_free_boundary];
    }
    return tensor_new(transport->arena, transport->dtype, transport->num_rows,
                      transport->hidden_size);
}

static void boundary_give_back(struct walk *walk, const struct tensor *tensor)
{
    CHECK(walk->num_free_boundary < walk->max_boundary, "%d boundary tensors are free",
          walk->num_free_boundary);
    walk->free_boundary[walk->num_free_boundary++] = *tensor;
}

/* ---- messages ---- */

/* The first chunk of the first stage has no input and sends no gradient; the last of the last has
 * no output and receives none. */
static bool step_receives(const struct walk *walk, const struct pipeline_step *step)
{
    return step->direction == PIPELINE_FORWARD
               ? !pipeline_step_is_first(&walk->schedule->shape, step)
               : !pipeline_step_is_last(&walk->schedule->shape, step);
}

static bool step_sends(const struct walk *walk, const struct pipeline_step *step)
{
    return step->direction == PIPELINE_FORWARD
               ? !pipeline_step_is_last(&walk->schedule->shape, step)
               : !pipeline_step_is_first(&walk->schedule->shape, step);
}

static void post_receive(struct walk *walk, struct link *link)
{
    struct message *message =
        &link->receives[(link->first_receive + link->num_receives++) % (link->num_ahead + 1)];

    message->tensor = boundary_take(walk);
    message->handle =
        comm_receive(link->comm, walk->transport->stream, &message->tensor, link->from);
}

/* In the order of the schedule, until num_wanted are under way or none is left. */
static void post_receives(struct walk *walk, enum pipeline_direction direction, int num_wanted)
{
    struct link *link = &walk->links[direction];

    while (link->num_receives < num_wanted && link->next_step < walk->schedule->num_steps) {
        const struct pipeline_step *step = &walk->schedule->steps[link->next_step++];

        if (step->direction == direction && step_receives(walk, step)) {
            post_receive(walk, link);
        }
    }
}

static struct tensor wait_for_receive(struct walk *walk, struct link *link)
{
    const struct message *message = &link->receives[link->first_receive];

    CHECK(link->num_receives > 0, "%s: no receive is posted", link->comm->name);
    comm_wait(message->handle, walk->transport->stream);
    link->first_receive = (link->first_receive + 1) % (link->num_ahead + 1);
    link->num_receives--;
    return message->tensor;
}

static void wait_for_send(struct walk *walk, struct link *link)
{
    if (link->send.tensor.data != NULL) {
        comm_wait(link->send.handle, walk->transport->stream);
        boundary_give_back(walk, &link->send.tensor);
        link->send.tensor.data = NULL;
    }
}

/* tensor is the link's until it is sent. */
static void start_send(struct walk *walk, struct link *link, const struct tensor *tensor)
{
    link->send.tensor = *tensor;
    link->send.handle =
        comm_send(link->comm, walk->transport->stream, &link->send.tensor, link->to);
}

/* ---- slots ---- */

static struct slot *take_slot(const struct walk *walk, const struct pipeline_step *step)
{
    for (int i = 0; i < walk->schedule->max_in_flight; i++) {
        if (!walk->slots[i].is_taken) {
            walk->slots[i] = (struct slot){.is_taken = true, .holder = *step};
            return &walk->slots[i];
        }
    }
    PANIC("microbatch %d of chunk %d would be forward number %d in flight", step->microbatch,
          step->chunk, walk->schedule->max_in_flight + 1);
}

static struct slot *find_slot(const struct walk *walk, const struct pipeline_step *step)
{
    for (int i = 0; i < walk->schedule->max_in_flight; i++) {
        const struct pipeline_step *holder = &walk->slots[i].holder;

        if (walk->slots[i].is_taken && holder->microbatch == step->microbatch &&
            holder->chunk == step->chunk) {
            return &walk->slots[i];
        }
    }
    PANIC("backward of microbatch %d of chunk %d comes before its forward", step->microbatch,
          step->chunk);
}

static void free_slot(struct walk *walk, struct slot *slot)
{
    slot->is_taken = false;
    if (slot->input.data != NULL) {
        boundary_give_back(walk, &slot->input);
    }
}

/* ---- steps ---- */

static int forward(struct walk *walk, const struct pipeline_step *step, const struct tensor *input,
                   struct tensor *output)
{
    struct slot *slot = take_slot(walk, step);

    if (input != NULL) {
        slot->input = *input;
        input = &slot->input;
    }
    TRY(walk->work->forward(walk->work->context, step, (int)(slot - walk->slots), input, output));
    if (!walk->has_backward) {
        free_slot(walk, slot);
    }
    return 0;
}

static int backward(struct walk *walk, const struct pipeline_step *step,
                    const struct tensor *d_output, struct tensor *d_input)
{
    struct slot *slot = find_slot(walk, step);

    TRY(walk->work->backward(walk->work->context, step, (int)(slot - walk->slots), d_output,
                             d_input));
    free_slot(walk, slot);
    if (d_output != NULL) {
        boundary_give_back(walk, d_output);
    }
    return 0;
}

static void post_receives_around(struct walk *walk, const struct pipeline_step *step)
{
    for (int direction = PIPELINE_FORWARD; direction <= PIPELINE_BACKWARD; direction++) {
        const bool is_own = direction == (int)step->direction && step_receives(walk, step);

        post_receives(walk, direction, walk->links[direction].num_ahead + (is_own ? 1 : 0));
    }
}

static int run_step(struct walk *walk, const struct pipeline_step *step)
{
    struct link *link = &walk->links[step->direction];
    struct tensor received, sent;
    struct tensor *in = NULL, *out = NULL;

    post_receives_around(walk, step);
    if (step_receives(walk, step)) {
        received = wait_for_receive(walk, link);
        in = &received;
    }
    if (step_sends(walk, step)) {
        wait_for_send(walk, link);
        sent = boundary_take(walk);
        out = &sent;
    }
    TRY(step->direction == PIPELINE_FORWARD ? forward(walk, step, in, out)
                                            : backward(walk, step, in, out));
    if (out != NULL) {
        start_send(walk, link, out);
    }
    return 0;
}

/* ---- the walk ---- */

static void link_init(struct link *link, const struct walk *walk, struct comm *comm, int to,
                      int num_ahead)
{
    const int num_stages = walk->schedule->shape.num_stages;

    CHECK(comm->size == num_stages && comm->rank == walk->schedule->shape.stage,
          "group %s: rank %d of %d, and stage %d of %d", comm->name, comm->rank, comm->size,
          walk->schedule->shape.stage, num_stages);
    link->comm = comm;
    link->to = (comm->rank + to + num_stages) % num_stages;
    link->from = (comm->rank - to + num_stages) % num_stages;
    link->num_ahead = num_ahead;
    link->receives = calloc((size_t)num_ahead + 1, sizeof *link->receives);
    CHECK(link->receives != NULL, "out of memory");
}

static void links_init(struct walk *walk)
{
    const struct pipeline_shape *shape = &walk->schedule->shape;
    const struct pipeline_transport *transport = walk->transport;
    const int overlap = transport->overlap ? 1 : 0;
    const int around = shape->num_chunks > 1 && shape->microbatch_group_size > shape->num_stages
                           ? shape->microbatch_group_size - shape->num_stages
                           : 0;

    link_init(&walk->links[PIPELINE_FORWARD], walk, transport->forward, 1,
              overlap + (shape->stage == 0 ? around : 0));
    link_init(&walk->links[PIPELINE_BACKWARD], walk, transport->backward, -1,
              overlap + (shape->stage == shape->num_stages - 1 ? around : 0));
}

static bool has_backward(const struct pipeline_schedule *schedule)
{
    return schedule->num_steps > 0 &&
           schedule->steps[schedule->num_steps - 1].direction == PIPELINE_BACKWARD;
}

static void walk_begin(struct walk *walk)
{
    const struct pipeline_shape *shape = &walk->schedule->shape;

    CHECK(shape->num_stages > 1 || shape->num_chunks == 1, "one stage of %d chunks",
          shape->num_chunks);
    walk->has_backward = has_backward(walk->schedule);
    if (shape->num_stages > 1) {
        links_init(walk);
    }
    /* inputs; received and to come; what is sent and what is being computed */
    walk->max_boundary = walk->schedule->max_in_flight + walk->links[PIPELINE_FORWARD].num_ahead +
                         walk->links[PIPELINE_BACKWARD].num_ahead + 6;
    walk->slots = calloc((size_t)walk->schedule->max_in_flight, sizeof *walk->slots);
    walk->free_boundary = calloc((size_t)walk->max_boundary, sizeof *walk->free_boundary);
    CHECK(walk->slots != NULL && walk->free_boundary != NULL, "out of memory");
}

static int run_steps(struct walk *walk)
{
    for (int i = 0; i < walk->schedule->num_steps; i++) {
        TRY(run_step(walk, &walk->schedule->steps[i]));
    }
    wait_for_send(walk, &walk->links[PIPELINE_FORWARD]);
    wait_for_send(walk, &walk->links[PIPELINE_BACKWARD]);
    return 0;
}

static void walk_end(struct walk *walk)
{
    free(walk->links[PIPELINE_FORWARD].receives);
    free(walk->links[PIPELINE_BACKWARD].receives);
    free(walk->free_boundary);
    free(walk->slots);
}

int pipeline_execute(const struct pipeline_schedule *schedule, const struct pipeline_work *work,
                     const struct pipeline_transport *transport)
{
    struct walk walk = {.schedule = schedule, .work = work, .transport = transport};
    const bool moves = schedule->shape.num_stages > 1;
    const struct arena_mark start = moves ? arena_mark(transport->arena) : (struct arena_mark){0};
    int result;

    walk_begin(&walk);
    result = run_steps(&walk);
    /* After an error messages may still be on their way into the boundary tensors. */
    if (moves && result == 0) {
        arena_release(transport->arena, start);
    }
    walk_end(&walk);
    return result;
}
